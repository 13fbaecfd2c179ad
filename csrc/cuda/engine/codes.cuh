// The codes of a step: drawn from the logits of its active channels as kernels/sample.py draws, and the sum of their
// embeddings, which is the next step's input.
#pragma once

#include "product.cuh"

namespace {

// A float32 as an integer of the same order; -0 is 0.
__device__ inline uint32_t ordered(float value) {
    const uint32_t bits = float_bits(value + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

constexpr int SHARED_BY = 32;  // ids, by the lanes of a warp

__host__ __device__ inline int runs_of(int size) { return (size + SHARED_BY - 1) / SHARED_BY; }

// Bytes that a draw among `size` ids takes of x's place: their scores; of each run of ids the results of two rounds.
__host__ __device__ inline int draw_scratch(int size) { return 4 * (size + 2 * 4 * runs_of(size)); }

// A row's channel of a step, by all threads of a block: a warp has every n-th run of 32 ids, and all warps put the runs'
// results together, in the order of ids. So the number of threads decides about nothing.
template <class T, int DEPTH>
struct Engine<T, DEPTH>::Channel {
    const Engine& engine;
    float* scores;  // [size]
    const float* noise;
    int size, empty;
    int round = 0;

    // Calls `of(run, id, score, real)` for this warp's runs of ids. All lanes go through them alike, for they shuffle.
    template <class Of>
    __device__ void each(Of of) const {
        for (int run = engine.warp; run < runs_of(size); run += engine.warps) {
            const int id = run * SHARED_BY + engine.lane;
            of(run, id < size ? id : 0, scores[id < size ? id : 0], id < size);
        }
    }

    // Results of runs: those of one round are read while those of the next are written.
    __device__ uint32_t* results(int which) const {
        return reinterpret_cast<uint32_t*>(scores + size) + (round % 2 * 4 + which) * runs_of(size);
    }

    __device__ static float of_warp(float value) {
        for (int mask = 1; mask < 32; mask *= 2) value += shfl_xor(value, mask);
        return value;
    }

    __device__ void put_best(int run, int which, uint32_t rank, int id) const {
        const uint32_t most = greatest_of_warp(rank), first = ~greatest_of_warp(rank == most ? ~uint32_t(id) : 0);
        if (engine.lane == 0) results(which)[run] = most, results(which + 1)[run] = first;
    }

    // The id with the greatest rank, of equals the lowest; NONE if no rank is above 0.
    __device__ int best(int which) const {
        uint32_t most = 0, best = ~0u;
        for (int run = engine.lane; run < runs_of(size); run += 32) {
            const uint32_t mine = results(which)[run], id = results(which + 1)[run];
            if (mine > most) most = mine, best = id;
        }
        const uint32_t of_all = greatest_of_warp(most);
        const uint32_t first = ~greatest_of_warp(most == of_all ? ~best : 0);
        return of_all ? int(first) : NONE;
    }

    __device__ uint32_t greatest(int which) const {
        uint32_t most = 0;
        for (int run = engine.lane; run < runs_of(size); run += 32) most = max_of(most, results(which)[run]);
        return greatest_of_warp(most);
    }

    __device__ void put_sum(int run, int which, float value) const {
        const float sum = of_warp(value);
        if (engine.lane == 0) results(which)[run] = float_bits(sum);
    }

    __device__ float sum(int which) const {
        float sum = 0;
        for (int run = engine.lane; run < runs_of(size); run += 32) sum += bits_float(results(which)[run]);
        return of_warp(sum);
    }

    __device__ static uint32_t max_of(uint32_t a, uint32_t b) { return a > b ? a : b; }
    static constexpr uint32_t NO_RANK = 0x007fffff;  // of -inf, which no id is drawn for

    __device__ uint32_t rank_of(int id, float value) const {
        return id == empty || !(value > -INFINITY) ? 0 : ordered(value) - NO_RANK;
    }

    // `scores` are logits. NONE where they are not finite.
    __device__ int draw(float temperature, int64_t top_k, float tail, bool greedy) {
        each([&](int run, int id, float logit, bool real) {
            put_best(run, 0, real ? rank_of(id, logit) : 0, id);
            const uint32_t lost = greatest_of_warp(real && !(logit < INFINITY));
            if (engine.lane == 0) results(2)[run] = lost;
            if (real && !greedy) scores[id] = logit / temperature;
        });
        __syncthreads();
        const int first = best(0);
        if (greatest(2) || first == NONE) return NONE;
        if (greedy) return first;
        ++round;
        uint32_t least = NO_RANK + 1;  // that is kept, as `ordered`
        if (top_k > 0 && top_k < size) least = max_of(least, kth_of(top_k));
        const auto kept = [&](float score) { return ordered(score) >= least; };
        // Draws from what is kept above an id in the order by score, then id.
        uint32_t above = 0;
        int above_id = NONE;
        const auto is_above = [&](int id, float score) {
            return above_id == NONE || ordered(score) > above || (ordered(score) == above && id > above_id);
        };
        const auto put_perturbed = [&](int run, int id, float score, bool real) {
            const bool drawn_from = real && kept(score) && is_above(id, score);
            put_best(run, 0, drawn_from ? rank_of(id, score + noise[id]) : 0, id);
        };
        each([&](int run, int id, float score, bool real) {
            put_perturbed(run, id, score, real);
            const uint32_t top = greatest_of_warp(real && kept(score) ? ordered(score) : 0);
            if (engine.lane == 0) results(2)[run] = top;
        });
        __syncthreads();
        int drawn = best(0);
        const uint32_t most = greatest(2);
        if (!(tail > 0)) return drawn == NONE ? first : drawn;
        const float top = most > NO_RANK ? bits_float(most >> 31 ? most & 0x7fffffffu : ~most) : 0;
        ++round;
        each([&](int run, int, float score, bool real) { put_sum(run, 0, real && kept(score) ? expf(score - top) : 0); });
        __syncthreads();
        const float total = fmaxf(sum(0), 1e-37f);
        while (drawn != NONE) {
            ++round;
            above = ordered(scores[drawn]), above_id = drawn;
            each([&](int run, int id, float score, bool real) {
                const bool more = real && kept(score) && is_above(id, score);
                put_sum(run, 2, real && kept(score) && !more ? expf(score - top) : 0);
                put_sum(run, 3, more);
                put_perturbed(run, id, score, real);
            });
            __syncthreads();
            // The last id of the order is always kept.
            if (sum(2) / total > tail || sum(3) == 0) break;
            drawn = best(0);
        }
        return drawn == NONE ? first : drawn;
    }

    // The k-th largest score, as `ordered`, bit by bit.
    __device__ uint32_t kth_of(int64_t k) {
        uint32_t kth = 0;
        for (int bit = 31; bit >= 0; --bit, ++round) {
            const uint32_t trial = kth | 1u << bit;
            each([&](int run, int, float score, bool real) { put_sum(run, 0, real && ordered(score) >= trial); });
            __syncthreads();
            if (sum(0) >= float(k)) kth = trial;
        }
        return kth;
    }
};

template <class T, int DEPTH>
__device__ __forceinline__ bool Engine<T, DEPTH>::draw(const Phase& phase) {
    const int step = now().step, active = p.active_count[step];
    float* const scores = reinterpret_cast<float*>(x());
#pragma unroll 1
    for (int job = blockIdx.x; job < rows * active; job += blocks) {
        const int m = job / active, a = job % active;
        const int64_t* const of = p.active[step] + a;
        const int channel = int(of[0]), frame = int(of[active]), base = int(of[2 * active]), size = int(of[3 * active]);
        const int first = base - p.first_row[step];
        const uint16_t* const from = from_of(phase) + int64_t(m) * phase.columns;
        for (int i = first / 4 + threadIdx.x; i < (first + size + 3) / 4; i += blockDim.x) {
            const uint2 four = wait_for(from + 4 * i);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int id = 4 * i + e - first;
                if (id >= 0 && id < size) scores[id] = value_of(four, e);
            }
        }
        if (!together()) return false;
        const bool greedy = p.noise == nullptr || p.greedy[m];
        const float* const noise = p.noise ? p.noise + (int64_t(m) * p.frames + frame) * p.table_rows + base : nullptr;
        Channel one{*this, scores, noise, size, int(of[4 * active])};
        const int code = one.draw(greedy ? 1 : p.temperature[m], greedy ? 0 : p.top_k[m], greedy ? 0 : p.tail[m], greedy);
        if (threadIdx.x == 0) {
            p.codes[(int64_t(m) * p.channels + channel) * p.frames + frame] = code;
            const int row = base + (code < 0 ? 0 : code);
            put(to_of(phase) + int64_t(m) * phase.width + a * DRAWN, make_uint2(row, 0));
        }
        // The next channel's scores take the place of these.
        __syncthreads();
    }
    if (int(blockIdx.x) >= rows * active) __syncthreads();
    return true;
}

template <class T, int DEPTH>
__device__ __forceinline__ bool Engine<T, DEPTH>::embed(const Phase& phase) {
    const int step = now().step, active = p.active_count[step], quads = p.embed_dim / 4;
    if (step + 1 < p.steps)
        for (int i = blockIdx.x + threadIdx.x * blocks; i < rows * quads; i += blocks * blockDim.x) {
            const int m = i / quads, column = i % quads * 4;
            const uint16_t* const from = from_of(phase) + int64_t(m) * phase.columns;
            float total[4] = {};
            for (int a = 0; a < active; ++a) {
                const uint2 drawn = wait_for(from + a * DRAWN);
                if (!there(drawn)) break;
                const uint2 four =
                    *reinterpret_cast<const uint2*>(p.embeddings + int64_t(drawn.x) * p.embed_dim + column);
#pragma unroll
                for (int e = 0; e < 4; ++e) total[e] += value_of(four, e);
            }
            uint16_t made[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) made[e] = narrow<T>(total[e]);
            put(to_of(phase) + int64_t(m) * phase.width + column,
                make_uint2(made[0] | uint32_t(made[1]) << 16, made[2] | uint32_t(made[3]) << 16));
        }
    return together();
}

}  // namespace
