// Types and arithmetic of the device on a CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __global__
#define __launch_bounds__(threads)

using cudaStream_t = void*;
using std::sqrt;

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct dim3 { int x = 1, y = 1; dim3(int x = 1, int y = 1) : x(x), y(y) {} };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline float rsqrtf(float value) { return 1 / std::sqrt(value); }

inline float from_bfloat16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t to_bfloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    return uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

inline float from_half(uint16_t bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return value;
}

inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t which) {
    const uint64_t both = uint64_t(high) << 32 | low;
    uint32_t got = 0;
    for (int i = 0; i < 4; ++i) got |= uint32_t(both >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
    return got;
}

inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    const auto product = [&](int shift) {
        return uint32_t(to_bfloat16(from_bfloat16(uint16_t(a >> shift)) * from_bfloat16(uint16_t(b >> shift)))) << shift;
    };
    return product(0) | product(16);
}

// What a lane of a warp whose lanes hold the operands `words` (a0 ... a3, b0, b1) gets from a matrix product.
inline void multiply_lane(float (&d)[4], const uint32_t (&words)[32][6], int lane) {
    const auto half = [](uint32_t word, int k) { return from_bfloat16(uint16_t(word >> 16 * (k % 2))); };
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = d[i];
        for (int k = 0; k < 16; ++k)
            sum += double(half(words[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k)) *
                   half(words[column * 4 + k % 8 / 2][4 + k / 8], k);
        d[i] = float(sum);
    }
}
