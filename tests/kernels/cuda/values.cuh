// Types and arithmetic of the device on a CPU, under the names of csrc/cuda/warp.cuh.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __grid_constant__

using cudaStream_t = void*;
using std::sqrt;

struct uint2 { uint32_t x, y; };
struct float2 { float x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct dim3 { int x = 1, y = 1; dim3(int x = 1, int y = 1) : x(x), y(y) {} };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct Bfloat16 {};
struct Float16 {};

inline float add(float a, float b) { return a + b; }
inline float mul(float a, float b) { return a * b; }
inline float rsqrtf(float value) { return 1 / std::sqrt(value); }

inline float bits_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// By the first bit: TABLE's upper half where it is one.
template <int TABLE, int SIZE = 8, class... Others>
uint32_t lop3(uint32_t first, Others... others) {
    constexpr int HALF = SIZE / 2, ONES = (1 << HALF) - 1, UPPER = TABLE >> HALF & ONES, LOWER = TABLE & ONES;
    const auto of = [&]<int PART>() {
        if constexpr (PART == 0 || PART == ONES)
            return PART ? ~uint32_t(0) : 0;
        else
            return lop3<PART, HALF>(others...);
    };
    const uint32_t upper = of.template operator()<UPPER>(), lower = of.template operator()<LOWER>();
    return UPPER == LOWER ? upper : lower ^ (first & (upper ^ lower));
}

inline uint32_t prmt(uint32_t low, uint32_t high, uint32_t which) {
    const uint64_t both = uint64_t(high) << 32 | low;
    uint32_t got = 0;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) got |= uint32_t(both >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
    return got;
}

// Exact: both exponents are shifted by powers of two, for not every CPU has an instruction for it.
inline float from_half(uint16_t bits) {
    const uint32_t rest = bits & 0x7fff;
    const float value = rest < 0x400 ? bits_float(rest | 0x3f000000) - 0.5f : bits_float((rest << 13) + 0x70000000) * 0x1p-112f;
    return bits_float(float_bits(value) | uint32_t(bits & 0x8000) << 16);
}

template <class T>
float widen(uint16_t bits);
template <>
inline float widen<Bfloat16>(uint16_t bits) { return bits_float(uint32_t(bits) << 16); }
template <>
inline float widen<Float16>(uint16_t bits) { return from_half(bits); }

template <class T>
uint16_t narrow(float value);
template <>
inline uint16_t narrow<Bfloat16>(float value) {
    const uint32_t wide = float_bits(value);
    return uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}
template <>
inline uint16_t narrow<Float16>(float value) {
    const uint32_t bits = float_bits(value), rest = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00 | (rest >> 13 & 0x3ff));
    if (rest >= 0x47800000) return uint16_t(sign | 0x7c00);
    // Below 2**-14 the sum with 0.5 rounds as the result has to.
    if (rest < 0x38800000) return uint16_t(sign | (float_bits(bits_float(rest) + 0.5f) - 0x3f000000));
    return uint16_t(sign | (((rest + 0xfff + (rest >> 13 & 1)) >> 13) - 0x1c000));
}

template <class T, class Operation>
uint32_t of_pairs(uint32_t a, uint32_t b, Operation operation) {
    const auto one = [&](int shift) {
        return uint32_t(narrow<T>(operation(widen<T>(uint16_t(a >> shift)), widen<T>(uint16_t(b >> shift))))) << shift;
    };
    return one(0) | one(16);
}
template <class T>
uint32_t mul_pairs(uint32_t a, uint32_t b) { return of_pairs<T>(a, b, [](float x, float y) { return x * y; }); }
template <class T>
uint32_t add_pairs(uint32_t a, uint32_t b) { return of_pairs<T>(a, b, [](float x, float y) { return x + y; }); }

template <class T>
uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c) {
    const auto one = [&](int shift) {
        const auto wide = [&](uint32_t pair) { return double(widen<T>(uint16_t(pair >> shift))); };
        return uint32_t(narrow<T>(float(wide(a) * wide(b) + wide(c)))) << shift;
    };
    return one(0) | one(16);
}

// ---- Products of tensor cores

using Floats = float __attribute__((vector_size(16)));
using Words = uint32_t __attribute__((vector_size(16)));

// Of the lower half of each word; the upper one is zeros.
template <class T>
Floats widen_four(Words halves) {
    if constexpr (std::is_same_v<T, Bfloat16>) return Floats(halves << 16);
    const Words rest = halves & 0x7fff;
    const Floats small = Floats(rest | 0x3f000000) - 0.5f, usual = Floats((rest << 13) + 0x70000000) * 0x1p-112f;
    return Floats((rest < 0x400 ? Words(small) : Words(usual)) | (halves & 0x8000) << 16);
}

// Of `mma_m16n8k16`: a0 ... a3, b0 and b1, and the sums of all lanes.
struct Operands {
    alignas(16) uint32_t a[4][32], b[2][32];
    alignas(16) float d[4][32];
};

// To each sum one product after the other, so that columns in another place have other bits. Vectors are of the columns
// 2 t, and 2 t + 1, of the lanes of a row of D.
template <class T>
void multiply(Operands& operands) {
    const auto four = [](auto* from, auto& as) { std::memcpy(&as, from, 16); };
    float a[4][2][32];  // the lower halves of words, then the upper ones
    Floats b[16][2];    // the even columns, then the odd ones
    for (int i = 0; i < 4; ++i)
        for (int lane = 0; lane < 32; lane += 4) {
            Words words;
            four(operands.a[i] + lane, words);
            const Floats low = widen_four<T>(words & 0xffff), high = widen_four<T>(words >> 16);
            std::memcpy(a[i][0] + lane, &low, 16), std::memcpy(a[i][1] + lane, &high, 16);
        }
    for (int i = 0; i < 2; ++i)
        for (int column = 0; column < 8; ++column) {
            Words words;
            four(operands.b[i] + 4 * column, words);
            const Floats low = widen_four<T>(words & 0xffff), high = widen_four<T>(words >> 16);
            for (int t = 0; t < 4; ++t) {
                b[8 * i + 2 * t][column % 2][column / 2] = low[t];
                b[8 * i + 2 * t + 1][column % 2][column / 2] = high[t];
            }
        }
    for (int lane = 0; lane < 32; lane += 4) {
        Floats sums[4];
        for (int i = 0; i < 4; ++i) four(operands.d[i] + lane, sums[i]);
        for (int half = 0; half < 2; ++half)
#pragma GCC unroll 8
            for (int k = 0; k < 8; ++k) {
                const float upper = a[2 * half][k % 2][lane + k / 2], lower = a[2 * half + 1][k % 2][lane + k / 2];
                const Floats even = b[8 * half + k][0], odd = b[8 * half + k][1];
                sums[0] += upper * even, sums[1] += upper * odd;
                sums[2] += lower * even, sums[3] += lower * odd;
            }
        for (int i = 0; i < 4; ++i) std::memcpy(operands.d[i] + lane, &sums[i], 16);
    }
}
