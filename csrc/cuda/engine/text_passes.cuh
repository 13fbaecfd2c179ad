// What text.cuh makes of ids by all threads of a block: those of a row that are its own, all of a row, or all blocks' lists.
// A pass leaves a warp's results in shared memory, where they are put together after a barrier.
#pragma once

#include "codes.cuh"

namespace {

constexpr int LISTED = 16, ROUNDS = 5;
constexpr int CHUNK = 16;                        // ids that go to a block together, as in a tile of the product
constexpr int OF_ROUND = 3;                      // pieces of 8 bytes that a block publishes of a row in a round
constexpr int PIECES = 1 + LISTED + OF_ROUND * ROUNDS;
constexpr int ROWS_AT_ONCE = LISTED / OF_ROUND;  // whose pieces of a round take no more place than a row's lists
constexpr int RESULTS = 8;                       // words of a warp and row
constexpr uint32_t NO_ID = (1u << 20) - 1, MARK = 1u << 20;  // beside an id in its word: lost, banned, or some above
constexpr float NEAR_ERROR = 1e-3f;              // NEAR of kernels/sample.py

// First word of Philox 4x32-10 for the counter (c0, c1, c2, 0).
__device__ inline uint32_t philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2) {
    uint32_t x0 = c0, x1 = c1, x2 = c2, x3 = 0, k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma unroll
    for (int i = 0; i < 10; ++i) {
        const uint64_t p0 = uint64_t(x0) * 0xD2511F53u, p1 = uint64_t(x2) * 0xCD9E8D57u;
        x0 = uint32_t(p1 >> 32) ^ x1 ^ k0, x1 = uint32_t(p1);
        x2 = uint32_t(p0 >> 32) ^ x3 ^ k1, x3 = uint32_t(p0);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return x0;
}

// Gumbel noise of these bits: within NEAR_ERROR, and exact.
__device__ inline float near_gumbel(uint32_t word) {
    const float u = (float(word) + 0.5f) * 0x1p-32f, rest = (float(~word) + 0.5f) * 0x1p-32f;
    // -log(1 - u), by its series where the logarithm would cancel.
    const float series = u * (1 + u * (0.5f + u * (0.3333333333f + u * 0.25f)));
    return -fast_log(u < 0.03125f ? series : -fast_log(rest));
}

__device__ inline float exact_gumbel(uint32_t word) {
    // 1 - w is exact in float64, so that its logarithm is as good as log1p(-w).
    return -float(log(-log(1 - (double(word) + 0.5) * 0x1p-32)));
}

// 16 bits of T as an integer of the same order; -0 is 0. And back.
__device__ inline uint32_t key_of(uint16_t bits) {
    if (bits == 0x8000) bits = 0;
    return bits >> 15 ? uint16_t(~bits) : bits | 0x8000u;
}
__device__ inline uint16_t bits_of(uint32_t key) { return uint16_t(key >> 15 ? key & 0x7fffu : ~key); }

// What is known of a row's draw.
struct TextState {
    int32_t status;   // TextPasses::Status
    int32_t best;     // id
    int32_t winner;   // id that top-p is to keep
    uint32_t top;     // key of the greatest logit
};

// Bytes that a draw takes of x's place, with as many threads as a block may have.
__host__ __device__ inline int text_scratch(int rows, int blocks) {
    return rows * 16 * RESULTS * 4 + 2 * 32 * 4 + MOST_ROWS * int(sizeof(TextState)) + 8 * blocks * LISTED;
}

template <class T, int DEPTH>
struct Engine<T, DEPTH>::TextPasses {
    enum Status : int32_t { DONE, WAITING, ALONE };

    const Engine& engine;
    const Phase& phase;
    int round = 0;  // of `tallies`

    const Program& p = engine.p;
    const int lane = engine.lane, warp = engine.warp, warps = engine.warps, blocks = engine.blocks, rows = engine.rows;

    // ---- Shared memory

    __device__ uint32_t* results(int m, int of_warp) const {
        return reinterpret_cast<uint32_t*>(engine.x()) + (m * warps + of_warp) * RESULTS;
    }
    // Of one round, [warps]: read while those of the next are written.
    __device__ uint32_t* tallies() const { return results(rows, 0) + round % 2 * 32; }
    __device__ TextState& state(int m) const { return reinterpret_cast<TextState*>(results(rows, 0) + 2 * 32)[m]; }
    __device__ uint2* gathered() const { return reinterpret_cast<uint2*>(&state(MOST_ROWS)); }

    // ---- Rows and ids

    struct Row {
        int m;
        const uint16_t* logits;
        const unsigned char* banned;  // null: none
        uint64_t seed;
        uint32_t draw, slot;
        float temperature, tail;
        int top_k;                    // 0: off
        bool greedy;

        __device__ float score(uint16_t bits) const { return widen<T>(bits) / temperature; }
        __device__ uint32_t word(int id) const { return philox(seed, id, draw, slot); }
        // Whether blocks publish lists, winners; whether all are to test the winner.
        __device__ bool lists() const { return top_k > 0; }
        __device__ bool draws() const { return !greedy && top_k == 0; }
        __device__ bool tests() const { return draws() && tail > 0; }
    };

    __device__ Row row(int m) const {
        const bool greedy = p.temperature == nullptr || p.greedy[m];
        const int64_t top_k = greedy ? 0 : p.top_k[m];
        return {m,
                engine.vector(phase.from, 0, true) + int64_t(m) * phase.columns,
                p.banned ? p.banned + m * p.banned_stride : nullptr,
                greedy ? 0 : uint64_t(p.seeds[m]),
                greedy ? 0 : uint32_t(p.draws[m]),
                uint32_t(p.text_slot),
                greedy ? 1 : p.temperature[m],
                greedy ? 0 : p.tail[m],
                top_k > 0 && top_k < p.vocabulary ? int(top_k) : 0,
                greedy};
    }
    __device__ bool settles(int m) const { return m % blocks == int(blockIdx.x); }

    // Ids of every n-th chunk, of which a thread has every n-th quad.
    struct Ids {
        const TextPasses& passes;
        const Row& row;
        int first, every, thread, threads;

        __device__ int id_of(int quad) const { return (first + quad / 4 * every) * CHUNK + quad % 4 * 4; }

        // Calls of(id, bits of its logit, whether it is not banned), the least id first: for so many ids at a time, of so
        // many quads that are asked for at a time.
        template <int AT_ONCE, int QUADS, class Of>
        __device__ __forceinline__ void each(Of of) const {
            const int size = passes.p.vocabulary;
#pragma unroll 1
            for (int quad = thread; id_of(quad / 4 * 4) < size; quad += QUADS * threads) {
                uint2 fours[QUADS];
#pragma unroll
                for (int i = 0; i < QUADS; ++i)
                    if (id_of(quad + i * threads) < size)
                        fours[i] = load_relaxed(reinterpret_cast<const uint2*>(row.logits + id_of(quad + i * threads)));
#pragma unroll
                for (int i = 0; i < QUADS; ++i) {
                    const int begin = id_of(quad + i * threads);
                    if (begin >= size) continue;
                    const uint2 four = there(fours[i]) ? fours[i] : passes.engine.wait_for(row.logits + begin);
#pragma unroll AT_ONCE
                    for (int e = 0; e < 4; ++e)
                        if (begin + e < size)
                            of(begin + e, uint16_t((e < 2 ? four.x : four.y) >> e % 2 * 16),
                               !(row.banned && row.banned[begin + e]));
                }
            }
        }
    };
    __device__ Ids own_ids(const Row& row, int thread, int threads) const {
        // That of the product whose logits these are, which comes right before.
        return {*this, row, first_job(engine.matrices()[p.count - 2]), blocks, thread, threads};
    }
    __device__ Ids all_ids(const Row& row) const { return {*this, row, 0, 1, int(threadIdx.x), int(blockDim.x)}; }

    // Ids of all blocks' lists.
    struct Lists {
        const uint2* pieces;
        int count;

        template <int, int, class Of>
        __device__ __forceinline__ void each(Of of) const {
#pragma unroll 1
            for (int i = threadIdx.x; i < count; i += blockDim.x)
                if (const uint32_t id = pieces[i].x % MARK; id != NO_ID)
                    of(int(id), bits_of(pieces[i].y), pieces[i].x < MARK);
        }
    };

    // Scores that are kept so far, as `ordered`, and the id that all have to be above in the order by score, then id.
    struct Kept {
        uint32_t least = 0, above = 0;
        int above_id = NONE;

        __device__ bool has(float score) const { return score > -INFINITY && ordered(score) >= least; }
        __device__ bool is_above(int id, float score) const {
            return above_id == NONE || ordered(score) > above || (ordered(score) == above && id > above_id);
        }
    };

    // ---- Of a warp

    __device__ static uint32_t lowest_of_warp(uint32_t value) { return ~greatest_of_warp(~value); }

    // The id with the greatest rank, of equals the lowest; rank 0 is none.
    __device__ static void best_of_warp(uint32_t& rank, uint32_t& id) {
        const uint32_t most = greatest_of_warp(rank);
        id = lowest_of_warp(rank == most ? id : NO_ID), rank = most;
    }

    __device__ static void take_better(uint32_t& rank, uint32_t& id, uint32_t other, uint32_t other_id) {
        if (other > rank || (other == rank && other_id < id)) rank = other, id = other_id;
    }

    __device__ static uint64_t sum_of_warp(uint64_t value) {
        // In parts whose sums fit into a word.
        constexpr uint32_t PART = (1u << 22) - 1;
        return add_of_warp(uint32_t(value) & PART) + (uint64_t(add_of_warp(uint32_t(value >> 22) & PART)) << 22) +
               (uint64_t(add_of_warp(uint32_t(value >> 44))) << 44);
    }

    // ---- Passes over ids; a warp's results are words of `results`

    // 0, 1: best key that is not banned, and its id. 2: greatest key. 3: whether a logit is NaN or +inf.
    template <class Set>
    __device__ __forceinline__ void survey(const Set& set, int m) const {
        uint32_t best = 0, best_id = NO_ID, top = 0, lost = 0;
        set.template each<4, 1>([&](int id, uint16_t bits, bool allowed) {
            const float logit = widen<T>(bits);
            lost |= !(logit < INFINITY);
            if (!(logit > -INFINITY)) return;
            const uint32_t key = key_of(bits);
            top = key > top ? key : top;
            if (allowed) take_better(best, best_id, key, id);
        });
        best_of_warp(best, best_id);
        top = greatest_of_warp(top), lost = greatest_of_warp(lost);
        uint32_t* const to = results(m, warp);
        if (lane == 0) to[0] = best, to[1] = best_id, to[2] = top, to[3] = lost;
    }

    // 5, 6: the greatest score + noise, as `ordered`, and its id. A barrier.
    template <class Set>
    __device__ __forceinline__ void draw(const Set& set, const Row& row, const Kept& kept) {
        float best = -INFINITY, second = -INFINITY, best_score = 0;
        uint32_t best_id = NO_ID;
        const auto drawn_from = [&](int id, float score, bool allowed) {
            return allowed && kept.has(score) && kept.is_above(id, score);
        };
        set.template each<4, 1>([&](int id, uint16_t bits, bool allowed) {
            const float score = row.score(bits);
            if (!drawn_from(id, score, allowed)) return;
            const float value = score + near_gumbel(row.word(id));
            if (best_id == NO_ID || value > best)
                second = best, best = value, best_score = score, best_id = id;
            else
                second = fmaxf(second, value);
        });
        const uint32_t most_of_warp = greatest_of_warp(best_id == NO_ID ? 0 : ordered(best));
        uint32_t* const most_of = tallies();
        if (lane == 0) most_of[warp] = most_of_warp;
        __syncthreads();
        const uint32_t most = greatest_of_warp(lane < warps ? most_of[lane] : 0);
        ++round;
        uint32_t rank = 0, id = NO_ID;
        if (best_id != NO_ID) {
            const float near = bits_float(most >> 31 ? most & 0x7fffffffu : ~most);
            // Both are off by as much at most, and by their rounding. Infinite scores give no bound.
            const float least = near - (2 * NEAR_ERROR + fabsf(near) * 1e-6f);
            if (!(second < least)) {
                set.template each<1, 1>([&](int i, uint16_t bits, bool allowed) {
                    const float score = row.score(bits);
                    const uint32_t word = row.word(i);
                    if (drawn_from(i, score, allowed) && !(score + near_gumbel(word) < least))
                        take_better(rank, id, ordered(score + exact_gumbel(word)), i);
                });
            } else if (!(best < least)) {
                rank = ordered(best_score + exact_gumbel(row.word(best_id))), id = best_id;
            }
        }
        best_of_warp(rank, id);
        if (lane == 0) results(row.m, warp)[5] = rank, results(row.m, warp)[6] = id;
    }

    // 0, 1: weight up to `kept.above_id`, as words. 2, 3: that of all that is kept. 4: whether any is above it.
    template <class Set>
    __device__ __forceinline__ void weigh(const Set& set, const Row& row, const Kept& kept, float top) const {
        uint64_t upto = 0, total = 0;
        uint32_t above = 0;
        set.template each<1, 1>([&](int id, uint16_t bits, bool) {
            const float score = row.score(bits);
            if (!kept.has(score)) return;
            const uint64_t weight = uint64_t(expf(score - top) * 0x1p40f);
            total += weight;
            if (kept.is_above(id, score))
                above = 1;
            else
                upto += weight;
        });
        upto = sum_of_warp(upto), total = sum_of_warp(total), above = greatest_of_warp(above);
        uint32_t* const to = results(row.m, warp);
        if (lane == 0) {
            to[0] = uint32_t(upto >> 32), to[1] = uint32_t(upto);
            to[2] = uint32_t(total >> 32), to[3] = uint32_t(total);
            to[4] = above;
        }
    }

    // Sums of the warps' weights, and whether any has marked its results; by each warp that calls this.
    struct Weights {
        uint64_t upto, total;
        uint32_t above;

        // The last id of the order is always kept.
        __device__ bool drop(float tail) const { return above && float(upto) / float(total) <= tail; }
    };
    __device__ Weights weights_of(int m) const {
        const uint32_t* const from = results(m, lane < warps ? lane : 0);
        const bool real = lane < warps;
        return {sum_of_warp(real ? uint64_t(from[0]) << 32 | from[1] : 0),
                sum_of_warp(real ? uint64_t(from[2]) << 32 | from[3] : 0), greatest_of_warp(real ? from[4] : 0)};
    }
    __device__ void best_of_block(int m, int which, uint32_t& rank, uint32_t& id) const {
        const uint32_t* const from = results(m, lane < warps ? lane : 0) + which;
        rank = lane < warps ? from[0] : 0, id = lane < warps ? from[1] : NO_ID;
        best_of_warp(rank, id);
    }

    // What is kept above an id.
    __device__ void raise(Kept& kept, const Row& row, int id) const {
        const uint2 four = engine.wait_for(row.logits + id / 4 * 4);
        kept.above = ordered(row.score(uint16_t((id % 4 < 2 ? four.x : four.y) >> id % 2 * 16)));
        kept.above_id = id;
    }
    __device__ float top_of(const Row& row) const { return row.score(bits_of(state(row.m).top)); }
};

}  // namespace
