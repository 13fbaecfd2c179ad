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

inline float from_half(uint16_t bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return value;
}

template <class T>
float widen(uint16_t bits);
template <>
inline float widen<Bfloat16>(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}
template <>
inline float widen<Float16>(uint16_t bits) { return from_half(bits); }

template <class T>
uint16_t narrow(float value);
template <>
inline uint16_t narrow<Bfloat16>(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
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

// What a lane of a warp whose lanes hold the operands `words` (a0 ... a3, b0, b1) gets from `mma_m16n8k16`.
template <class T>
void multiply_lane(float (&d)[4], const uint32_t (&words)[32][6], int lane) {
    const auto half = [](uint32_t word, int k) { return widen<T>(uint16_t(word >> 16 * (k % 2))); };
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        // One after the other, so that columns in another place have other bits.
        float sum = d[i];
        for (int k = 0; k < 16; ++k)
            sum += half(words[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k) *
                   half(words[column * 4 + k % 8 / 2][4 + k / 8], k);
        d[i] = sum;
    }
}
