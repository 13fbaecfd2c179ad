// What blocks exchange: reading it into x and the residual, and publishing sums.
#pragma once

#include "engine.cuh"

namespace {

// Looks at a piece, and another, until both are of this tag. False if somebody has lost patience: then all leave.
template <int BITS, int DEPTH, bool USUAL>
__device__ inline bool Engine<BITS, DEPTH, USUAL>::get(const uint4* from, const uint4* other, uint32_t tag,
                                                       uint4& piece, uint4& second) {
    piece = load_relaxed(from), second = load_relaxed(other);
#pragma unroll 1
    for (uint32_t looks = 1;; ++looks) {
        const bool come = is_of(piece, tag), second_come = is_of(second, tag);
        if (come && second_come) return true;
        if (p.without & 1) return true;
        if (looks % 1024 == 0) {
            if (looks >= PATIENCE) store_relaxed(p.state + 32, 1);
            if (load_relaxed(p.state + 32)) {
                *stop = 1;
                return false;
            }
        }
        look_again(p.pause);
        if (!come) piece = load_relaxed(from);
        if (!second_come) second = load_relaxed(other);
    }
}

template <int BITS, int DEPTH, bool USUAL>
__device__ inline bool Engine<BITS, DEPTH, USUAL>::get(const uint4* from, uint32_t tag, uint4& piece) {
    piece = load_relaxed(from);
#pragma unroll 1
    for (uint32_t looks = 1;; ++looks) {
        if (is_of(piece, tag) || p.without & 1) return true;
        if (looks % 1024 == 0) {
            if (looks >= PATIENCE) store_relaxed(p.state + 32, 1);
            if (load_relaxed(p.state + 32)) {
                *stop = 1;
                return false;
            }
        }
        look_again(p.pause);
        piece = load_relaxed(from);
    }
}

// The last sums to the residual, then x = norm weight times it, rounded; without its scale, which comes last.
template <int BITS, int DEPTH, bool USUAL>
__device__ inline void Engine<BITS, DEPTH, USUAL>::stage_residual(int which, const uint4* partial, uint32_t tag,
                                                                  const uint2 weight, const uint16_t* input) {
    const int i = threadIdx.x;
    if (i >= quads) return;
    if (input) {
        const uint2 given = load_shared_data(reinterpret_cast<const uint2*>(input) + i);
        residual[0] = widen<Bfloat16>(uint16_t(given.x)), residual[1] = widen<Bfloat16>(uint16_t(given.x >> 16));
        residual[2] = widen<Bfloat16>(uint16_t(given.y)), residual[3] = widen<Bfloat16>(uint16_t(given.y >> 16));
    } else if (partial) {
        uint4 first, second;
        get(partial + i, partial + quads + i, tag, first, second);
        float a[4], b[4];
        note(which, 0);
        untag(first, a), untag(second, b);
#pragma unroll
        for (int e = 0; e < 4; ++e) residual[e] += a[e] + b[e];
    }
    float square = 0, sum = 0;
    uint16_t* place = x + (which == END ? 4 * threadIdx.x : place_of<BITS>(4 * threadIdx.x));
    const uint16_t weights[4] = {uint16_t(weight.x), uint16_t(weight.x >> 16), uint16_t(weight.y),
                                 uint16_t(weight.y >> 16)};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        square += residual[e] * residual[e];
        const uint16_t value = narrow<Bfloat16>(residual[e] * widen<Bfloat16>(weights[e]));
        sum += widen<Bfloat16>(value);
        place[which == END ? e : place_after<BITS>(e)] = value;
    }
    if (SUM_X && which != END) {
        sum += shfl_xor(sum, 1), sum += shfl_xor(sum, 2);
        if (i % 4 == 0) x_sums[i / 4] = sum;
    }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) square += shfl_xor(square, mask);
    if (i % 32 == 0) squares[i / 32] = square;
}

template <int BITS, int DEPTH, bool USUAL>
__device__ inline void Engine<BITS, DEPTH, USUAL>::stage_gated() {
    const int half = ffn() / 8;
    for (int h = 0; h < 2; ++h) {
        if (!(needs >> h & 1)) continue;
        for (int i = h * half + threadIdx.x; i < (h + 1) * half; i += threads()) {
            uint4 piece;
            get(gated + i, tag, piece);
            note(DOWN, 0);
            float values[4], sum = 0;
            uint16_t* place = x + place_of<BITS>(4 * uint32_t(i));
            untag(piece, values);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const uint16_t value = narrow<Bfloat16>(values[e]);
                sum += widen<Bfloat16>(value);
                place[place_after<BITS>(e)] = value;
            }
            if (SUM_X) {
                sum += shfl_xor(sum, 1), sum += shfl_xor(sum, 2);
                if (i % 4 == 0) x_sums[i / 4] = sum;
            }
        }
    }
}

// The four sums of a quad of rows, over units first, ..., in order.
template <int BITS, int DEPTH, bool USUAL>
__device__ inline void Engine<BITS, DEPTH, USUAL>::add(int first, int inner, int quad, float (&total)[4]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) total[e] = 0;
#pragma unroll 16
    for (int i = 0; i < inner; ++i) {
        float more[4];
        load_four(sums + (first + i) * TILE + quad * 4, more);
#pragma unroll
        for (int e = 0; e < 4; ++e) total[e] += more[e];
    }
}

// silu(gate) up of this block's jobs, a row a lane of its first warp.
template <int BITS, int DEPTH, bool USUAL>
__device__ inline void Engine<BITS, DEPTH, USUAL>::publish_gated(float scale) {
    if (warp) return;
    const uint32_t inner = inner_of(GATE_UP), all = own_of(GATE_UP) * TILE;
    for (uint32_t start = 0; start < all; start += 32) {
        const uint32_t i = start + lane < all ? start + lane : 0, own = i / TILE, row = i % TILE;
        const float* from = sums + own * 2 * inner * TILE + row;
        float gate = 0, up = 0;
#pragma unroll 8
        for (uint32_t k = 0; k < inner; ++k) gate += from[k * TILE], up += from[(inner + k) * TILE];
        const float value = silu(gate * scale) * (up * scale);
        float four[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) four[e] = shfl(value, lane / 4 * 4 + e);
        const uint32_t job = blockIdx.x + own * blocks();
        if (start + lane < all && lane % 4 == 0) put(gated + job * 4 + row / 4, four);
    }
}

template <int BITS, int DEPTH, bool USUAL>
template <int WHICH>
__device__ inline void Engine<BITS, DEPTH, USUAL>::publish(int layer, const uint2 first_bias, float scale) {
    if constexpr (WHICH == GATE_UP) return publish_gated(scale);
    constexpr int EACH = WHICH == QKV ? 12 : 4;
    const uint32_t inner = inner_of(WHICH), units = inner * tiles_of(WHICH), all = own_of(WHICH) * EACH;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < all; i += USUAL ? all : threads()) {
        const uint32_t own = USUAL ? 0 : i / EACH, place = USUAL ? i : i % EACH, tile = place / 4, quad = i % 4;
        const uint32_t job = blockIdx.x + own * blocks(), half = job % 2;
        float total[4];
        add(own * units + tile * inner, inner, quad, total);
        if (WHICH == QKV) {
            const uint2 both = USUAL || i == uint32_t(threadIdx.x) ? first_bias : *bias_of(layer, i);
            const uint16_t bias[4] = {uint16_t(both.x), uint16_t(both.x >> 16), uint16_t(both.y),
                                      uint16_t(both.y >> 16)};
#pragma unroll
            for (int e = 0; e < 4; ++e) total[e] = total[e] * scale + (half ? 0 : widen<Bfloat16>(bias[e]));
            put(qkv + job * 12 + place, total);
        } else {
            put((WHICH == OUT ? out : down) + half * quads + job / 2 * 4 + quad, total);
        }
    }
}

}  // namespace
