// Eight float32 or int32 at once, under names of our own. A set of kernels includes one implementation, all of which
// give the same results, with these exceptions: `fma` and `fnma` round twice in portable C++, and `min` and `max` of a
// number and NaN as the second argument are NaN or, where NaN comes first, either.
//
//     Floats load(p)  store(p, v)  splat(x)         eight values in memory; the same value eight times
//     a + b  a - b  a * b  a / b  -a  min  max  abs
//     fma(a, b, c) = a b + c      fnma(a, b, c) = c - a b
//     sum(v)  largest(v)                            of the eight
//     store_sums(v, y)                              y[i] = sum of v[i], i < 4, in another order than `sum`
//     select_negative(x, a, b)                      a where x has its sign bit set, b elsewhere
//     Ints   round(v), splat(i)                     to the nearest integer, ties to even; |v| below 2^22
//     as_floats(i)                                  the same bits
//     to_floats(i)  load(p)  store(p, i)  a + b  shift_left<n>(i)
//     each_sum(v)                                   in lane i the sum of v[i], i < 8
//     times_power(v, n)                             v 2^n of a normal v, by its exponent's bits
//     load_bfloat16(p)  load_float16(p)             eight values of 16 bits, widened
//     store_bfloat16(p, v)                          rounded as `to_bfloat16`
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

#if defined(MIMO_FAST_AVX2) || defined(MIMO_FAST_AVX512)
#include "simd_avx2.h"
#elif defined(MIMO_FAST_NEON)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif

#include "parameters.h"

namespace mimo_fast::MIMO_FAST_SET {

INLINE Floats operator-(Floats v) { return splat(0.0f) - v; }

INLINE int64_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

INLINE float from_bfloat16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

INLINE uint16_t to_bfloat16(float value) {
    if (value != value) return 0x7FC0;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

INLINE float from_float16(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    uint32_t wide = sign | (exponent + 112) << 23 | fraction << 13;
    if (exponent == 31) wide = sign | 0x7F800000 | fraction << 13;
    float value;
    std::memcpy(&value, &wide, 4);
    if (exponent == 0) value = (sign ? -1.0f : 1.0f) * float(fraction) * 0x1p-24f;
    return value;
}

INLINE float read(const void* values, Type type, int64_t i) {
    return type == Type::float32 ? static_cast<const float*>(values)[i]
                                 : from_bfloat16(static_cast<const uint16_t*>(values)[i]);
}

INLINE void write(void* values, Type type, int64_t i, float value) {
    if (type == Type::float32) static_cast<float*>(values)[i] = value;
    else static_cast<uint16_t*>(values)[i] = to_bfloat16(value);
}

// Values i ... i + 7.
INLINE Floats read8(const void* values, Type type, int64_t i) {
    return type == Type::float32 ? load(static_cast<const float*>(values) + i)
                                 : load_bfloat16(static_cast<const uint16_t*>(values) + i);
}

INLINE void write8(void* values, Type type, int64_t i, Floats v) {
    if (type == Type::float32) store(static_cast<float*>(values) + i, v);
    else store_bfloat16(static_cast<uint16_t*>(values) + i, v);
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace mimo_fast::MIMO_FAST_SET
