// What the products with int4 and int8 weights share: pairs of packed values as two T, and the checks and choices of
// their entry points.
#pragma once

#include <warp.cuh>

namespace {

constexpr int COLUMNS = 128;  // that are packed together
constexpr int INVALID = 1;    // cudaErrorInvalidValue

constexpr int AND_OR = 0xea;      // (a & b) | c
constexpr int NOT_AND_OR = 0xae;  // (~a & b) | c

// Two values of a word, at bits `shift` and 16 more, as two T: OFFSET plus what they stand for, exactly. q is stored with
// an offset, o = 8 or 128.
//
//   bfloat16, int4   (w & 000f000f) | 43004300         128 + q
//   bfloat16, int8   (w & 007f007f) | 43004300         128 + the low 7 bits, plus
//                    (~w & 00800080) | c300c300        -128 or -256: exactly q - 128
//   float16          (w & mask) | 64006400             1024 + q; in int8 1152 leaves at once
template <class T, int BITS>
struct Unpack;

template <>
struct Unpack<Bfloat16, 4> {
    static constexpr float OFFSET = 128 + 8;
    __device__ static uint32_t pair(uint32_t word, int shift) {
        return lop3<AND_OR>(word >> shift, 0x000f000f, 0x43004300);
    }
};

template <>
struct Unpack<Float16, 4> {
    static constexpr float OFFSET = 1024 + 8;
    __device__ static uint32_t pair(uint32_t word, int shift) {
        return lop3<AND_OR>(word >> shift, 0x000f000f, 0x64006400);
    }
};

template <>
struct Unpack<Bfloat16, 8> {
    static constexpr float OFFSET = 0;
    __device__ static uint32_t pair(uint32_t word, int shift) {
        const uint32_t low = lop3<AND_OR>(word >> shift, 0x007f007f, 0x43004300);
        return add_pairs<Bfloat16>(low, lop3<NOT_AND_OR>(word >> shift, 0x00800080, 0xc300c300));
    }
};

template <>
struct Unpack<Float16, 8> {
    static constexpr float OFFSET = 0;
    __device__ static uint32_t pair(uint32_t word, int shift) {
        return add_pairs<Float16>(lop3<AND_OR>(word >> shift, 0x00ff00ff, 0x64006400), 0xe480e480);
    }
};

__device__ inline float silu(float value) { return value / add(1, expf(-value)); }

inline const uint16_t* as16(const void* pointer) { return static_cast<const uint16_t*>(pointer); }

__host__ __device__ inline bool aligned(const void* pointer, int to) {
    return reinterpret_cast<uintptr_t>(pointer) % to == 0;
}

}  // namespace
