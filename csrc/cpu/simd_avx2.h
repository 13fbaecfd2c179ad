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
INLINE Ints load(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
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

INLINE void store_bfloat16(uint16_t* p, Floats a) {
    const __m256i bits = _mm256_castps_si256(a.v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7FC0), is_nan);
    const __m128i low = _mm256_castsi256_si128(high);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, _mm256_extracti128_si256(high, 1)));
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
INLINE Ints each_sum(const Ints (&a)[8]) {
    const auto fours = [&](int i) {
        return _mm256_hadd_epi32(_mm256_hadd_epi32(a[i].v, a[i + 1].v), _mm256_hadd_epi32(a[i + 2].v, a[i + 3].v));
    };
    const __m256i low = fours(0), high = fours(4);
    return {_mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31))};
}
INLINE void store_sums(const Floats* a, float* y) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a[0].v, a[1].v), _mm256_hadd_ps(a[2].v, a[3].v));
    _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

}  // namespace mimo_fast::MIMO_FAST_SET
