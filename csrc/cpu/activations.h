// Exponentials of eight values at once, and what is made of them; relative errors of about 2^-22.
#pragma once

#include "simd.h"

namespace mimo_fast::MIMO_FAST_SET {

// e^x = 2^n e^r with n an integer and |r| <= ln 2 / 2, where the series to r^7 is exact enough. Out of range: the
// least or largest normal power. NaN stays NaN: `min` and `max` give their second argument, or NaN, where one is.
INLINE Floats exp(Floats x) {
    x = max(splat(-87.0f), min(splat(88.0f), x));
    const Ints n = round(x * splat(1.44269504f));
    // ln 2 in two parts, the first of so few bits that n times it is exact.
    Floats r = fnma(to_floats(n), splat(0x1.62ep-1f), x);
    r = fnma(to_floats(n), splat(0x1.0bfbe8p-15f), r);
    Floats sum = splat(1.0f / 5040);
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = fma(sum, r, splat(c));
    return times_power(sum, n);
}

// x / (1 + e^-x).
INLINE Floats silu(Floats x) { return x / (splat(1.0f) + exp(-x)); }

// x (1 + erf(x / sqrt 2)) / 2, by erfc(z) = p(1 / (1 + 0.3275911 z)) e^(-z^2) of Abramowitz and Stegun, 7.1.26.
INLINE Floats gelu(Floats x) {
    const Floats one = splat(1.0f), z = abs(x) * splat(0.70710678f);
    const Floats t = one / fma(z, splat(0.3275911f), one);
    Floats p = splat(1.061405429f);
    for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0.0f}) p = fma(p, t, splat(c));
    const Floats half = p * splat(0.5f) * exp(-(z * z));
    return x * select_negative(x, half, one - half);
}

}  // namespace mimo_fast::MIMO_FAST_SET
