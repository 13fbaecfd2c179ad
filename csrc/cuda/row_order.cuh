// What decides about the bits of a row of a product: kernels that share it give a row the same bits. quantized_mma.cu has
// few rows of x, row_tiles.cu many.
//
//   y [M, N] = epilogues(norm(x) W^T + b)          formulas: mimo_fast/kernels/matmul/product.py
//                                                  layout of W: mimo_fast/kernels/matmul/quantized_weight.py
//
// W is the operand with 16 rows (A), x the one with 8 columns (B): up to 8 rows of x cost what one does. What a product sums
// over may be in any order, if only A and B agree, so a thread multiplies the very words that it loaded.
//
//   unit: rows of W x 128 columns           what is multiplied before a scale applies
//     int4, 16 words a row                    thread t of the four that share row g: words 4 t ... 4 t + 3, 16 bytes
//       word i, bits 4 v and 4 v + 16         columns 16 v + 4 t + i and 64 more, v = 0 ... 3
//     int8, 32 words a row                    words 4 t ... and 16 + 4 t ..., 16 bytes each
//       word i of part v / 2, bits 8 (v % 2)  columns 32 (v % 2) + 16 (v / 2) + 4 t + i and 64 more
//     dense, 64 words a row                   words 16 i + 4 v + t, as ldmatrix gives them
//       word (i, v)                           columns 32 i + 8 v + 2 t and the next
//   pair (i, v): these two columns as the halves of a register; four registers are A, two are B of one instruction
//
//   order of sums  In a unit two alternating chains over i, of v = 0, 1 and v = 2, 3; their sum, less what the offset adds,
//                  times the scale. Units c, c + CLASSES, ... are class c and are added to it in this order; then the
//                  classes are added in theirs. CLASSES follows from K alone.
//   rounding       x times the norm's weight to T once; all else in float32, where every sum and product that the compiler
//                  might or might not join is stated as one or as two; y to T once. There are no atomics.
#pragma once

#include "quantized.cuh"

namespace {

constexpr int PAIRS = 4;  // v

// T, BITS: of x and what goes with it; of a value of W, 16 where it is dense, of T. GROUPED: W has a scale for each 128
// columns, else for each row (int8) or none (dense).
template <class T_, int BITS_, bool GROUPED_>
struct Form {
    using T = T_;
    static constexpr int BITS = BITS_;
    static constexpr bool GROUPED = GROUPED_;
    static constexpr int PARTS = BITS / 4;    // pieces of 16 bytes that a thread has of a row in a unit
    static constexpr bool SUM_X = BITS == 4;  // the others have neither zeros nor an offset

    static_assert(BITS == 8 || (BITS == 4 && GROUPED) || (BITS == 16 && !GROUPED));
};

// Values of K from which on there are so many classes, and classes below.
constexpr int LONG = 2048, LONG_CLASSES = 16, SHORT_CLASSES = 8;

static_assert(LONG / COLUMNS >= LONG_CLASSES && 1024 / COLUMNS >= SHORT_CLASSES, "no class without units, from K = 1024 on");

__host__ __device__ inline int classes_of(int k) { return k >= LONG ? LONG_CLASSES : SHORT_CLASSES; }

// ---- Unpacking

// Pairs as they are multiplied: OFFSET leaves again with the sum of x, or in float16 at once.
template <class T, int BITS>
struct Multiplied : Unpack<T, BITS> {};

template <>
struct Multiplied<Float16, 4> {
    static constexpr float OFFSET = 0;
    __device__ static uint32_t pair(uint32_t word, int shift) {
        return add_pairs<Float16>(Unpack<Float16, 4>::pair(word, shift), 0xe408e408);  // minus 1032
    }
};

template <class T>
struct Multiplied<T, 16> {
    static constexpr float OFFSET = 0;
};

__device__ inline uint32_t word(const uint4& words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// Pair (i, v) of the words that a thread has of a row.
template <class C>
__device__ inline uint32_t weight_pair(const uint4 (&words)[C::PARTS], int i, int v) {
    using Pair = Multiplied<typename C::T, C::BITS>;
    if constexpr (C::BITS == 4) return Pair::pair(word(words[0], i), 4 * v);
    if constexpr (C::BITS == 8) return Pair::pair(word(words[v / 2], i), v % 2 * 8);
}

// ---- x

// A thread's part of a row's block of columns: columns i and 64 more for i of four, from `column` on.
template <class C>
struct Eight {
    using T = typename C::T;
    uint2 low, high;

    __device__ static Eight load(const uint16_t* from, bool real) {
        const auto quad = [&](int at) { return real ? *reinterpret_cast<const uint2*>(from + at) : make_uint2(0, 0); };
        return {quad(0), quad(64)};
    }

    template <class Operation>
    __device__ static float over(const uint2& quad, Operation of) {
        const float first = add(of(widen<T>(uint16_t(quad.x))), of(widen<T>(uint16_t(quad.x >> 16))));
        return add(first, add(of(widen<T>(uint16_t(quad.y))), of(widen<T>(uint16_t(quad.y >> 16)))));
    }

    template <class Operation>
    __device__ float part(Operation of) const {
        return add(over(low, of), over(high, of));
    }

    // Over the 16 threads of a row's block: v, then t.
    template <class Operation>
    __device__ float sum(Operation of) const {
        float sum = part(of);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum += shfl_xor(sum, i < 2 ? 4 << i : 1 << (i - 2));
        return sum;
    }

    __device__ void multiply(const Eight& by) {
        low = make_uint2(mul_pairs<T>(low.x, by.low.x), mul_pairs<T>(low.y, by.low.y));
        high = make_uint2(mul_pairs<T>(high.x, by.high.x), mul_pairs<T>(high.y, by.high.y));
    }

    __device__ void store(uint32_t* to, int step) const {
        to[0] = prmt(low.x, high.x, 0x5410);
        to[step] = prmt(low.x, high.x, 0x7632);
        to[2 * step] = prmt(low.y, high.y, 0x5410);
        to[3 * step] = prmt(low.y, high.y, 0x7632);
    }
};

// The first column of part v of thread t in a block.
template <class C>
__device__ inline int first_column(int v, int t) {
    return (C::BITS == 4 ? 16 * v : 32 * (v % 2) + 16 * (v / 2)) + 4 * t;
}

// A row's block of columns, of which each of four threads has all parts.
template <class C>
struct Quarter {
    Eight<C> eight[PAIRS];  // of v; of a dense weight's x, of i

    // real: whether there are such columns; else zeros.
    __device__ static Quarter load(const uint16_t* block, bool real) {
        Quarter got;
        const int t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            if constexpr (C::BITS == 16) {
                const auto pair = [&](int v) {
                    const uint16_t* const from = block + 32 * i + 8 * v + 2 * t;
                    return real ? *reinterpret_cast<const uint32_t*>(from) : 0;
                };
                got.eight[i] = {make_uint2(pair(0), pair(1)), make_uint2(pair(2), pair(3))};
            } else {
                got.eight[i] = Eight<C>::load(block + first_column<C>(i, t), real);
            }
        }
        return got;
    }

    // In the order of `Eight::sum`.
    template <class Operation>
    __device__ float sum(Operation of) const {
        float sum = add(add(eight[0].part(of), eight[1].part(of)), add(eight[2].part(of), eight[3].part(of)));
        sum += shfl_xor(sum, 1);
        return sum + shfl_xor(sum, 2);
    }

    __device__ void multiply(const Quarter& by) {
#pragma unroll
        for (int v = 0; v < PAIRS; ++v) eight[v].multiply(by.eight[v]);
    }

    // pairs[i]: of all v.
    __device__ void sort(uint4 (&pairs)[4]) const {
        if constexpr (C::BITS == 16) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                pairs[i] = {eight[i].low.x, eight[i].low.y, eight[i].high.x, eight[i].high.y};
        } else {
            uint32_t sorted[PAIRS][4];
#pragma unroll
            for (int v = 0; v < PAIRS; ++v) eight[v].store(sorted[v], 1);
#pragma unroll
            for (int i = 0; i < 4; ++i) pairs[i] = {sorted[0][i], sorted[1][i], sorted[2][i], sorted[3][i]};
        }
    }
};

__device__ inline float itself(float value) { return value; }
__device__ inline float squared(float value) { return mul(value, value); }

// The norm's scale of a row: 1 / sqrt(mean of squares + eps), from the sums of its blocks' squares, which lie `step` apart.
__device__ inline float norm_scale(const float* squares, int step, int k, float eps) {
    float sum = 0;
#pragma unroll 8
    for (int block = 0; block < k / COLUMNS; ++block) sum += squares[block * step];
    return rsqrtf(sum / k + eps);
}

// ---- Sums

// A scale and, in the upper half, a zero of float16: what a unit's sums of a row of W are multiplied with, and what times
// the sum of x leaves before.
template <class C>
struct Affine {
    float scale, offset;

    __device__ static Affine of(uint32_t both) {
        using T = typename C::T;
        return {widen<T>(uint16_t(both)), Multiplied<T, C::BITS>::OFFSET + from_half(uint16_t(both >> 16))};
    }

    __device__ static Affine none() { return {1, 0}; }

    // total: of the units of its class before. chain: the unit's two. sum_x: of the unit's columns.
    __device__ float with_unit(float total, float chain0, float chain1, float sum_x) const {
        float sum = chain0 + chain1;
        if (C::SUM_X) sum = fmaf(-offset, sum_x, sum);
        return fmaf(scale, sum, total);
    }
};

// ---- What follows the sums

// sum: over K. scale: of an int8 row, else 1. norm: the scale of its row of x, else 1.
__device__ inline float product_of(float sum, float scale, float norm, float bias) {
    return fmaf(mul(sum, scale), norm, bias);
}

__device__ inline float swiglu_of(float gate, float up) { return mul(silu(gate), up); }

}  // namespace
