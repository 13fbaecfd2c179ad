// `simd.h` by AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

namespace mimo_fast::MIMO_FAST_SET {

struct Floats {
    __m256 v;
};
struct Ints {
    __m256i v;
};

INLINE Floats load(const float* p) { return {_mm256_loadu_ps(p)}; }
INLINE void store(float* p, Floats a) { _mm256_storeu_ps(p, a.v); }
INLINE Floats splat(float x) { return {_mm256_set1_ps(x)}; }
INLINE Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
INLINE Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
INLINE Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
INLINE Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
INLINE Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.v, b.v)}; }
INLINE Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.v, b.v)}; }
INLINE Floats abs(Floats a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
INLINE Floats fnma(Floats a, Floats b, Floats c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
INLINE Floats select_negative(Floats x, Floats a, Floats b) { return {_mm256_blendv_ps(b.v, a.v, x.v)}; }

INLINE Ints splat(int32_t i) { return {_mm256_set1_epi32(i)}; }
INLINE Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
template <int N>
INLINE Ints shift_left(Ints a) { return {_mm256_slli_epi32(a.v, N)}; }
INLINE Ints round(Floats a) { return {_mm256_cvtps_epi32(a.v)}; }
INLINE Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
INLINE Floats as_floats(Ints a) { return {_mm256_castsi256_ps(a.v)}; }
INLINE void store(int32_t* p, Ints a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
INLINE Floats times_power(Floats a, Ints n) {
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_slli_epi32(n.v, 23)))};
}

INLINE Floats load_bfloat16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
INLINE Floats load_float16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

INLINE float sum(Floats a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
INLINE float largest(Floats a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
INLINE void store_sums(const Floats* a, float* y) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a[0].v, a[1].v), _mm256_hadd_ps(a[2].v, a[3].v));
    _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

}  // namespace mimo_fast::MIMO_FAST_SET
