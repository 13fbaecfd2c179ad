// Exponentials of eight values at once, and what is made of them; relative errors of about 2^-22.
#pragma once

#include "numbers.h"

namespace mimo_fast {

// e^x = 2^n e^r with n an integer and |r| <= ln 2 / 2, where the series to r^7 is exact enough. Out of range: the
// least or largest normal power. NaN stays NaN: an intrinsic returns its second operand where one is.
AVX2_INLINE __m256 exp8(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(-87.0f), _mm256_min_ps(_mm256_set1_ps(88.0f), x));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    // ln 2 in two parts, the first of so few bits that n times it is exact.
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.62ep-1f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.0bfbe8p-15f), r);
    __m256 sum = _mm256_set1_ps(1.0f / 5040);
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        sum = _mm256_fmadd_ps(sum, r, _mm256_set1_ps(c));
    const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(sum), power));
}

// x / (1 + e^-x).
AVX2_INLINE __m256 silu8(__m256 x) {
    const __m256 one = _mm256_set1_ps(1);
    return _mm256_div_ps(x, _mm256_add_ps(one, exp8(_mm256_sub_ps(_mm256_setzero_ps(), x))));
}

// x (1 + erf(x / sqrt 2)) / 2, by erfc(z) = p(1 / (1 + 0.3275911 z)) e^(-z^2) of Abramowitz and Stegun, 7.1.26.
AVX2_INLINE __m256 gelu8(__m256 x) {
    const __m256 one = _mm256_set1_ps(1), sign = _mm256_set1_ps(-0.0f);
    const __m256 z = _mm256_mul_ps(_mm256_andnot_ps(sign, x), _mm256_set1_ps(0.70710678f));
    const __m256 t = _mm256_div_ps(one, _mm256_fmadd_ps(z, _mm256_set1_ps(0.3275911f), one));
    __m256 p = _mm256_set1_ps(1.061405429f);
    for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0.0f})
        p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(c));
    const __m256 half = _mm256_mul_ps(
        _mm256_mul_ps(p, _mm256_set1_ps(0.5f)), exp8(_mm256_xor_ps(sign, _mm256_mul_ps(z, z))));
    return _mm256_mul_ps(x, _mm256_blendv_ps(_mm256_sub_ps(one, half), half, x));
}

}  // namespace mimo_fast
