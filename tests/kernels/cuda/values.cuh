// Types and arithmetic of the device on a CPU, under the names of csrc/cuda/warp.cuh.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)

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

template <int TABLE>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d = 0;
    for (int i = 0; i < 8; ++i)
        if (TABLE >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return d;
}

inline uint32_t prmt(uint32_t low, uint32_t high, uint32_t which) {
    const uint64_t both = uint64_t(high) << 32 | low;
    uint32_t got = 0;
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
    const _Float16 half = _Float16(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
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

// d [16, 8] += a [16, 16] b [16, 8], for each element one product after the other, so that columns in another place have
// other bits.
inline void multiply(const float (&a)[16][16], const float (&b)[16][8], float (&d)[16][8]) {
    using Four = float __attribute__((vector_size(16)));
    const auto four = [](auto& row, int column) {
        return reinterpret_cast<Four*>(const_cast<float*>(row + column));
    };
    for (int row = 0; row < 16; row += 4)
        for (int column = 0; column < 8; column += 4) {
            Four sum0 = *four(d[row], column), sum1 = *four(d[row + 1], column);
            Four sum2 = *four(d[row + 2], column), sum3 = *four(d[row + 3], column);
            for (int k = 0; k < 16; ++k) {
                const Four factor = *four(b[k], column);
                sum0 += a[row][k] * factor, sum1 += a[row + 1][k] * factor;
                sum2 += a[row + 2][k] * factor, sum3 += a[row + 3][k] * factor;
            }
            *four(d[row], column) = sum0, *four(d[row + 1], column) = sum1;
            *four(d[row + 2], column) = sum2, *four(d[row + 3], column) = sum3;
        }
}
