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

// Largest angle that `sine_and_cosine` takes: its multiples of pi / 2 have few bits.
constexpr float LARGEST_ANGLE = 4096;

// Sine and cosine of angles up to LARGEST_ANGLE, to about 2^-23. x = n pi / 2 + r with |r| <= pi / 4, where series are
// short; pi / 2 is in three parts, of which n times the first two is exact.
INLINE void sine_and_cosine(Floats x, Floats& sine, Floats& cosine) {
    const Ints n = round(x * splat(0.63661977f));
    const Floats count = to_floats(n);
    Floats r = fnma(count, splat(1.5703125f), x);
    r = fnma(count, splat(4.837512969970703125e-4f), r);
    r = fnma(count, splat(7.54978995489188e-8f), r);
    const Floats square = r * r, one = splat(1.0f);
    Floats s = fma(fma(splat(-1.9515296e-4f), square, splat(8.3321609e-3f)), square, splat(-0.16666655f));
    s = fma(s * square, r, r);
    Floats c = fma(fma(splat(2.4433157e-5f), square, splat(-1.3887316e-3f)), square, splat(4.1666646e-2f));
    c = fma(c * square, square, fnma(square, splat(0.5f), one));
    // Odd n: sine and cosine change places. Bit 1 of n, and of n + 1, is the sign of sine, and of cosine.
    const Floats odd = as_floats(shift_left<31>(n));
    const Floats a = select_negative(odd, c, s), b = select_negative(odd, s, c);
    sine = select_negative(as_floats(shift_left<30>(n)), -a, a);
    cosine = select_negative(as_floats(shift_left<30>(n + splat(1))), -b, b);
}

}  // namespace mimo_fast::MIMO_FAST_SET
