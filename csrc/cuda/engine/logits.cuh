// Logits of a step's channels, and the codes drawn from them.
#pragma once

#include "engine.cuh"

namespace {

// Eight products of bfloat16.
template <int BITS, int DEPTH, bool USUAL>
__device__ inline float Engine<BITS, DEPTH, USUAL>::dot(const uint4& a, const uint4& b) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t v = part_of(a, i), w = part_of(b, i);
        sum += widen<Bfloat16>(uint16_t(v)) * widen<Bfloat16>(uint16_t(w));
        sum += widen<Bfloat16>(uint16_t(v >> 16)) * widen<Bfloat16>(uint16_t(w >> 16));
    }
    return sum;
}

template <int BITS, int DEPTH, bool USUAL>
__device__ inline void Engine<BITS, DEPTH, USUAL>::load_head(const Active& active, int row, uint4 (&values)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        values[i] = make_uint4(0, 0, 0, 0);
        if (row < active.rows && i * 256 < dim())
            values[i] = reinterpret_cast<const uint4*>(p.heads + int64_t(active.first + row) * dim())[i * 32 + lane];
    }
}

// Logits of this block's rows to `sums`, published by fours; `values` and `more` are those of this warp's first two.
template <int BITS, int DEPTH, bool USUAL>
__device__ inline void Engine<BITS, DEPTH, USUAL>::make_logits(const Active& active, uint4 (&values)[4],
                                                               const uint4 (&more)[4]) {
    const float scale = norm_scale();
    const int fours = (active.rows + 3) / 4, own = (fours - int(blockIdx.x) + blocks() - 1) / blocks();
#pragma unroll 1
    for (int i = warp; i < own * 4; i += warps) {
        if (i == warp + warps)
#pragma unroll
            for (int j = 0; j < 4; ++j) values[j] = more[j];
        else if (i != warp)
            load_head(active, head_row(i), values);
        float sum = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (j * 256 < dim()) sum += dot(values[j], reinterpret_cast<const uint4*>(x)[j * 32 + lane]);
        for (int mask = 1; mask < 32; mask *= 2) sum += shfl_xor(sum, mask);
        if (lane == 0) sums[i] = head_row(i) < active.rows ? widen<Bfloat16>(narrow<Bfloat16>(sum * scale)) : -INFINITY;
    }
    __syncthreads();
    note(END, 2);
#pragma unroll 1
    for (int i = threadIdx.x; i < own; i += threads()) {
        float four[4];
        load_four(sums + 4 * i, four);
        put(logits + blockIdx.x + i * blocks(), four);
    }
    note(END, 3);
}

// Of rows 4 i ... 4 i + 3 of this step's, zeros for those that there are not.
template <int BITS, int DEPTH, bool USUAL>
__device__ inline void Engine<BITS, DEPTH, USUAL>::load_noise(int step, const Active& active, int i,
                                                              float (&noise)[4]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const int row = 4 * i + e;
        noise[e] = 0;
        if (p.noise == nullptr || row >= active.rows) continue;
        int channel = active.low;
#pragma unroll
        for (int a = 1; a < FRAMES; ++a)
            if (active.low + a < active.high && active.first + row >= p.firsts[active.low + a]) channel = active.low + a;
        noise[e] = p.noise[int64_t(step - channel) * p.firsts[p.channels] + active.first + row];
    }
}

// Draws this step's codes from all logits; the residual is the sum of their embeddings, rounded. False: all leave.
// `noises`: of this thread's first two pieces.
template <int BITS, int DEPTH, bool USUAL>
__device__ inline bool Engine<BITS, DEPTH, USUAL>::draw(int step, const Active& active, const float (&noises)[2][4]) {
    const int fours = (active.rows + 3) / 4;
    uint32_t best[FRAMES] = {}, code[FRAMES] = {};
    int seen = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < fours; i += threads(), ++seen) {
        float noise[4];
        if (seen < 2) {
#pragma unroll
            for (int e = 0; e < 4; ++e) noise[e] = seen ? noises[1][e] : noises[0][e];
        } else {
            load_noise(step, active, i, noise);
        }
        uint4 piece;
        get(logits + i, tag, piece);
        note(DRAW, 0);
        float values[4];
        untag(piece, values);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int row = active.first + 4 * i + e;
            int mine = 0;
#pragma unroll
            for (int a = 1; a < FRAMES; ++a)
                if (active.low + a < active.high && row >= p.firsts[active.low + a]) mine = a;
            const uint32_t id = row - p.firsts[active.low + mine];
            const float score = values[e] * p.per_temperature + noise[e];
            const uint32_t rank = id == uint32_t(p.empty[active.low + mine]) ? 1 : ordered(score);
            if (4 * i + e >= active.rows) continue;
#pragma unroll
            for (int a = 0; a < FRAMES; ++a)
                if (a == mine && rank > best[a]) best[a] = rank, code[a] = id;
        }
    }
    // Of equal ones the first code: threads, and each its own, go up by rows.
#pragma unroll
    for (int a = 0; a < FRAMES; ++a) {
        const uint32_t most = greatest_of_warp(best[a]);
        const uint32_t first = ~greatest_of_warp(best[a] == most ? ~code[a] : 0);
        if (lane == 0) bests[a * 64 + warp] = most, bests[a * 64 + 32 + warp] = first;
    }
    __syncthreads();
    if (*stop) return false;
    const int i = threadIdx.x;
    uint2 fours_of[FRAMES];
    // All are asked for before the first is waited for.
#pragma unroll
    for (int a = 0; a < FRAMES; ++a) {
        const int channel = active.low + a;
        fours_of[a] = make_uint2(0, 0);
        if (channel >= active.high) continue;
        const uint32_t mine = lane < warps ? bests[a * 64 + lane] : 0;
        const uint32_t most = greatest_of_warp(mine);
        const uint32_t drawn = ~greatest_of_warp(lane < warps && mine == most ? ~bests[a * 64 + 32 + lane] : 0);
        if (blockIdx.x == 0 && i == 0) p.codes[channel * FRAMES + step - channel] = drawn;
        if (i < quads)
            fours_of[a] =
                reinterpret_cast<const uint2*>(p.embeddings + int64_t(p.firsts[channel] + drawn) * dim())[i];
    }
    float total[4] = {};
#pragma unroll
    for (int a = 0; a < FRAMES; ++a) {
        const uint2 four = fours_of[a];
        total[0] += widen<Bfloat16>(uint16_t(four.x)), total[1] += widen<Bfloat16>(uint16_t(four.x >> 16));
        total[2] += widen<Bfloat16>(uint16_t(four.y)), total[3] += widen<Bfloat16>(uint16_t(four.y >> 16));
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) residual[e] = widen<Bfloat16>(narrow<Bfloat16>(total[e]));
    note(DRAW, 1);
    return true;
}

}  // namespace
