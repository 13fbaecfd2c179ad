// Number formats of activations, and AVX2 registers of eight of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE AVX2 inline __attribute__((always_inline))

namespace mimo_fast {

enum class Type : int { float32, bfloat16 };

// Whether this machine has the instructions that the kernels use.
inline bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

inline int64_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

inline float from_bfloat16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t to_bfloat16(float value) {
    if (std::isnan(value)) return 0x7FC0;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float read(const void* values, Type type, int64_t i) {
    return type == Type::float32 ? static_cast<const float*>(values)[i]
                                 : from_bfloat16(static_cast<const uint16_t*>(values)[i]);
}

inline void write(void* values, Type type, int64_t i, float value) {
    if (type == Type::float32) static_cast<float*>(values)[i] = value;
    else static_cast<uint16_t*>(values)[i] = to_bfloat16(value);
}

AVX2_INLINE __m256 widen(__m128i bfloat16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bfloat16), 16));
}

// Values i ... i + 7.
AVX2_INLINE __m256 read8(const void* values, Type type, int64_t i) {
    return type == Type::float32
               ? _mm256_loadu_ps(static_cast<const float*>(values) + i)
               : widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(values) + i)));
}

AVX2_INLINE float sum8(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

AVX2_INLINE float max8(__m256 v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

}  // namespace mimo_fast
