// The text token of a row, drawn from its logits as kernels/sample.py draws: temperature, top-k, top-p, banned ids, one
// Gumbel-max draw with the noise of (seed, draw, slot, id).
//
// All blocks share the ids of a row: a block has those whose logits it has made itself, so it waits for none. It publishes
// what is best of its ids, and the token follows from what all have published:
//
//   greedy        best id that is not banned
//   no top-k      the id with the greatest score + noise, too. Noise is near first, in float32, and exact for those of the
//                 block's ids that the near one does not exclude: what is published is exact.
//   with top-k    the block's LISTED best ids instead. The k-th largest score of all lists is that of the row, unless a list
//                 ends before it is below that. One block a row draws from what the lists keep, top-p included.
//   top-p alone   all blocks know the winner then, and add up how much probability comes before it in the order by score,
//                 then id. With it they publish their winners among the ids above it, which is the next to be tested where
//                 top-p drops the first (one draw in twenty at 0.95).
//
//   exchanges     1 of 8 bytes a block and row (greedy), of 16 (neither top-k nor top-p), of 136 (top-k, whatever top-p)
//                 2 of 16 and 24 bytes (top-p alone), and one more of 24 each time that it drops the winner
//
// What these leave open one block settles alone, from the logits of all ids, which are exchanged for this: a list that was
// too short, as where k is many times LISTED a block; more than ROUNDS winners dropped.
//
// Probabilities are added as whole numbers, multiples of 2^-40 of the most probable id's: no order of sums, and so no grid
// and no number of threads, decides about anything. A token may differ from that of another implementation where a sum is
// within float32 rounding of 1 - top_p, as kernels/sample.py says, or where two perturbed scores are one value apart: a
// float64 logarithm of a GPU is within one unit in its last place, which rounds to another float32 once in about 2^28.
#pragma once

#include "text_passes.cuh"

namespace {

template <class T, int DEPTH>
struct Engine<T, DEPTH>::Text : TextPasses {
    using Passes = TextPasses;
    using typename Passes::Row, typename Passes::Ids, typename Passes::Lists, typename Passes::Kept, typename Passes::Weights;
    using Passes::DONE, Passes::WAITING, Passes::ALONE;
    using Passes::engine, Passes::phase, Passes::round, Passes::p, Passes::lane, Passes::warp, Passes::warps, Passes::blocks,
        Passes::rows;
    using Passes::results, Passes::tallies, Passes::state, Passes::gathered, Passes::row, Passes::settles, Passes::own_ids,
        Passes::all_ids, Passes::best_of_warp, Passes::take_better, Passes::sum_of_warp, Passes::survey, Passes::draw,
        Passes::weigh, Passes::weights_of, Passes::best_of_block, Passes::raise, Passes::top_of;

    // ---- What blocks publish

    __device__ uint16_t* piece(int m, int block, int i) const {
        uint16_t* const all = engine.vector(phase.partial, 0, true);
        return all + ((int64_t(m) * blocks + block) * PIECES + i) * 4;
    }
    __device__ void publish(int m, int i, uint32_t first, uint32_t second) const {
        if (lane == 0) put(piece(m, blockIdx.x, i), make_uint2(first, second));
    }
    __device__ static int first_of_round(int round) { return 1 + LISTED + (round - 1) * OF_ROUND; }

    // The row's best, and its list or winner; by a warp.
    __device__ void publish_first(const Row& row) const {
        const int m = row.m;
        const uint32_t* const from = results(m, lane < warps ? lane : 0);
        const uint32_t top = greatest_of_warp(lane < warps ? from[2] : 0);
        const uint32_t lost = greatest_of_warp(lane < warps ? from[3] : 0);
        uint32_t rank, id;
        best_of_block(m, 0, rank, id);
        publish(m, 0, id | (lost ? MARK : 0), rank | top << 16);
        if (row.lists()) {
            publish_list(row);
        } else if (row.draws()) {
            best_of_block(m, 5, rank, id);
            publish(m, 1, id, rank);
        }
    }

    // Each lane has its best OF_LANE in order, and looks for more when it has given them all.
    __device__ void publish_list(const Row& row) const {
        constexpr int OF_LANE = 4;
        const Ids own = own_ids(row, lane, 32);
        uint32_t keys[OF_LANE], ids[OF_LANE], given = ~0u, given_id = 0;
        const auto find = [&] {
#pragma unroll
            for (int j = 0; j < OF_LANE; ++j) keys[j] = 0, ids[j] = NO_ID;
            own.template each<4, 4>([&](int id, uint16_t bits, bool) {
                const uint32_t key = key_of(bits);
                const bool left = key < given || (key == given && uint32_t(id) > given_id);
                // Of equals the first, which has the lower id, stays before.
                if (!left || key <= keys[OF_LANE - 1] || !(widen<T>(bits) > -INFINITY)) return;
                keys[OF_LANE - 1] = key, ids[OF_LANE - 1] = id;
#pragma unroll
                for (int j = OF_LANE - 1; j > 0; --j)
                    if (keys[j] > keys[j - 1]) {
                        const uint32_t other = keys[j], other_id = ids[j];
                        keys[j] = keys[j - 1], ids[j] = ids[j - 1], keys[j - 1] = other, ids[j - 1] = other_id;
                    }
            });
        };
        find();
        uint32_t listed = 0, listed_id = NO_ID;  // place `lane` of the list
#pragma unroll 1
        for (int i = 0; i < LISTED; ++i) {
            uint32_t most = keys[0], first = ids[0];
            best_of_warp(most, first);
            if (lane == i) listed = most, listed_id = first;
            if (!most || ids[0] != first) continue;
            given = keys[0], given_id = ids[0];
#pragma unroll
            for (int j = 1; j < OF_LANE; ++j) keys[j - 1] = keys[j], ids[j - 1] = ids[j];
            keys[OF_LANE - 1] = 0, ids[OF_LANE - 1] = NO_ID;
            if (!keys[0]) find();
        }
        const bool banned = listed && row.banned && row.banned[listed_id];
        if (lane < LISTED) put(piece(row.m, blockIdx.x, 1 + lane), make_uint2(listed_id | (banned ? MARK : 0), listed));
    }

    __device__ void publish_round(int m, int number) const {
        const Weights weights = weights_of(m);
        uint32_t rank, id;
        best_of_block(m, 5, rank, id);
        const int first = first_of_round(number);
        publish(m, first, uint32_t(weights.upto >> 32), uint32_t(weights.upto));
        publish(m, first + 1, uint32_t(weights.total >> 32), uint32_t(weights.total));
        publish(m, first + 2, id | (weights.above ? MARK : 0), rank);
    }

    // ---- What follows from it

    __device__ void finish(int m, int token) const {
        if (lane) return;
        state(m).status = DONE;
        if (settles(m)) p.tokens[m] = token;
    }

    // Puts pieces, by their places, into shared memory; null: none.
    template <class Of>
    __device__ __forceinline__ void collect(int count, Of place) const {
        constexpr int AT_ONCE = 4;
#pragma unroll 1
        for (int begin = threadIdx.x; begin < count; begin += AT_ONCE * blockDim.x) {
            const uint16_t* from[AT_ONCE];
            uint2 got[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                const int i = begin + j * int(blockDim.x);
                from[j] = i < count ? place(i) : nullptr;
                if (from[j]) got[j] = load_relaxed(reinterpret_cast<const uint2*>(from[j]));
            }
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j)
                if (from[j]) gathered()[begin + j * int(blockDim.x)] = there(got[j]) ? got[j] : engine.wait_for(from[j]);
        }
    }

    // Pieces of this round of the rows that wait; of several rows at once, so that their loads overlap.
    __device__ void gather(int number, int first, int count) const {
        collect(count * blocks * OF_ROUND, [&](int i) -> const uint16_t* {
            const int which = i % OF_ROUND, m = first + i / OF_ROUND / blocks, block = i / OF_ROUND % blocks;
            if (state(m).status != WAITING) return nullptr;
            if (number == 0 && which > (row(m).draws() ? 1 : 0)) return nullptr;
            return piece(m, block, number == 0 ? which : first_of_round(number) + which);
        });
    }

    // What the first pieces of all blocks say of a row; by a warp.
    __device__ void conclude_first(const Row& row) const {
        uint32_t best = 0, best_id = NO_ID, top = 0, lost = 0, rank = 0, id = NO_ID;
        for (int block = lane; block < blocks; block += 32) {
            const uint2* const from = gathered() + (row.m % ROWS_AT_ONCE * blocks + block) * OF_ROUND;
            take_better(best, best_id, from[0].y & 0xffffu, from[0].x % MARK);
            top = from[0].y >> 16 > top ? from[0].y >> 16 : top, lost |= from[0].x / MARK;
            if (row.draws()) take_better(rank, id, from[1].y, from[1].x);
        }
        best_of_warp(best, best_id), best_of_warp(rank, id);
        top = greatest_of_warp(top), lost = greatest_of_warp(lost);
        if (lost || !best) return finish(row.m, NONE);
        if (row.greedy || (row.draws() && !rank)) return finish(row.m, int(best_id));
        if (row.draws() && !(row.tail > 0 && row.score(bits_of(top)) < INFINITY)) return finish(row.m, int(id));
        if (lane == 0) state(row.m) = {row.lists() ? ALONE : WAITING, int(best_id), int(id), top};
    }

    // What they say of its winner.
    __device__ void conclude(const Row& row, int number) const {
        Weights sums{};
        uint32_t rank = 0, id = NO_ID;
        for (int block = lane; block < blocks; block += 32) {
            const uint2* const from = gathered() + (row.m % ROWS_AT_ONCE * blocks + block) * OF_ROUND;
            sums.upto += uint64_t(from[0].x) << 32 | from[0].y, sums.total += uint64_t(from[1].x) << 32 | from[1].y;
            sums.above |= from[2].x / MARK;
            take_better(rank, id, from[2].y, from[2].x % MARK);
        }
        sums = {sum_of_warp(sums.upto), sum_of_warp(sums.total), greatest_of_warp(sums.above)};
        best_of_warp(rank, id);
        TextState& own = state(row.m);
        if (!sums.drop(row.tail)) return finish(row.m, own.winner);
        // All above are banned.
        if (!rank) return finish(row.m, own.best);
        if (lane == 0) {
            own.winner = int(id);
            if (number == ROUNDS) own.status = settles(row.m) ? ALONE : DONE;
        }
    }

    // ---- One block alone

    // How many keys are at least so great.
    template <class Set>
    __device__ __forceinline__ uint32_t count(const Set& set, uint32_t key) {
        uint32_t mine = 0;
        set.template each<4, 4>([&](int, uint16_t bits, bool) { mine += key_of(bits) >= key; });
        mine = add_of_warp(mine);
        uint32_t* const counts = tallies();
        if (lane == 0) counts[warp] = mine;
        __syncthreads();
        ++round;
        return add_of_warp(lane < warps ? counts[lane] : 0);
    }

    // The least score that top-k keeps, as `ordered`; 0 where there are no k ids.
    template <class Set>
    __device__ __forceinline__ uint32_t least_of(const Set& set, const Row& row) {
        uint32_t kth = 0;
#pragma unroll 1
        for (uint32_t bit = 0x8000; bit; bit /= 2)
            if (count(set, kth | bit) >= uint32_t(row.top_k)) kth |= bit;
        return kth ? ordered(row.score(bits_of(kth))) : 0;
    }

    // The token, of what top-k keeps.
    template <class Set>
    __device__ __forceinline__ int settle(const Set& set, const Row& row, uint32_t least) {
        Kept kept{least};
        const float top = top_of(row);
        while (true) {
            draw(set, row, kept);
            __syncthreads();
            uint32_t rank, id;
            best_of_block(row.m, 5, rank, id);
            if (!rank) return state(row.m).best;
            if (!(row.tail > 0 && top < INFINITY)) return int(id);
            raise(kept, row, int(id));
            weigh(set, row, kept, top);
            __syncthreads();
            if (!weights_of(row.m).drop(row.tail)) return int(id);
        }
    }

    // False if it waited in vain.
    __device__ bool alone(const Row& row) {
        int token = NONE;
        bool listed = row.lists();
        if (listed) {
            const int size = blocks * LISTED;
            collect(size, [&](int i) -> const uint16_t* { return piece(row.m, i / LISTED, 1 + i % LISTED); });
            if (!engine.together()) return false;
            const Lists lists{gathered(), size};
            const uint32_t least = least_of(lists, row);
            // Whether a list ends with what is kept.
            bool goes_on = false;
            for (int block = threadIdx.x; block < blocks; block += blockDim.x) {
                const uint2 last = gathered()[block * LISTED + LISTED - 1];
                goes_on |= last.x % MARK != NO_ID && Kept{least}.has(row.score(bits_of(last.y)));
            }
            listed = !any_of_block(goes_on);
            if (listed) token = settle(lists, row, least);
        }
        if (!listed) {
            const Ids ids = all_ids(row);
            token = settle(ids, row, row.lists() ? least_of(ids, row) : 0);
        }
        if (threadIdx.x == 0) p.tokens[row.m] = token;
        return engine.together();
    }

    __device__ bool waits() const {
        bool any = false;
        for (int m = 0; m < rows; ++m) any |= state(m).status == WAITING;
        return any;
    }

    // ---- All rows

    __device__ bool run() {
        for (int m = threadIdx.x; m < rows; m += blockDim.x) state(m).status = row(m).tests() || settles(m) ? WAITING : DONE;
        __syncthreads();
#pragma unroll 1
        for (int number = 0; number == 0 || waits(); ++number) {
#pragma unroll 1
            for (int m = 0; m < rows; ++m) {
                if (number && state(m).status != WAITING) continue;
                const Row own = row(m);
                const Ids ids = own_ids(own, threadIdx.x, blockDim.x);
                Kept kept;
                if (number) {
                    raise(kept, own, state(m).winner);
                    weigh(ids, own, kept, top_of(own));
                } else {
                    survey(ids, m);
                }
                if (own.draws()) draw(ids, own, kept);
            }
            if (!engine.together()) return false;
#pragma unroll 1
            for (int m = warp; m < rows; m += warps) {
                if (number == 0)
                    publish_first(row(m));
                else if (state(m).status == WAITING)
                    publish_round(m, number);
            }
#pragma unroll 1
            for (int first = 0; first < rows; first += ROWS_AT_ONCE) {
                const int end = first + ROWS_AT_ONCE < rows ? first + ROWS_AT_ONCE : rows;
                gather(number, first, end - first);
                if (!engine.together()) return false;
#pragma unroll 1
                for (int m = first + warp; m < end; m += warps) {
                    if (state(m).status != WAITING) continue;
                    number ? conclude(row(m), number) : conclude_first(row(m));
                }
                __syncthreads();
            }
        }
#pragma unroll 1
        for (int m = 0; m < rows; ++m)
            if (state(m).status == ALONE && !alone(row(m))) return false;
        __syncthreads();
        return true;
    }
};

// After all other phases, by an engine of its own: so it needs no registers beside theirs.
template <class T, int DEPTH>
__device__ __forceinline__ void Engine<T, DEPTH>::draw_text() const {
    const int64_t began = clocks_now();
    Text{{*this, p.phases[p.count - 1]}}.run();
    if (p.clocks && threadIdx.x == 0) p.clocks[int64_t(blockIdx.x + 1) * p.count - 1] += clocks_now() - began;
}

}  // namespace
