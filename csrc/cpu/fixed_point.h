// Rows of x in fixed point. Each block of x becomes x = s v with integers v of 16 bits and a float s, so that the
// block's largest value is 127 * 256 s: an error of 2^-16 of that value, where bfloat16 has 2^-9 of each.
#pragma once

#include "simd.h"

namespace mimo_fast::MIMO_FAST_SET {

constexpr int LARGEST_BLOCK = 128;
constexpr float LARGEST_FIXED = 127 * 256;
constexpr float LEAST_NORMAL = 0x1p-126f;

struct FixedBlock {
    int32_t values[LARGEST_BLOCK];  // v, in the order of x
    int32_t total;                  // their sum
    float step;                     // s
};

// The `block` values x, whose largest magnitude is `most`.
INLINE void fix_block(const float* x, float most, int block, FixedBlock& fixed) {
    // What is not finite must not pass as a number; a maximum may not see NaN, a sum does.
    Floats check = splat(0.0f);
    for (int i = 0; i < block; i += 8) check = check + load(x + i) * splat(0.0f);
    fixed.step = sum(check) == 0 ? most / LARGEST_FIXED : NAN;
    // What is too small for a normal step counts as zero.
    const float inverse = fixed.step >= LEAST_NORMAL ? 1 / fixed.step : 0;
    Ints total = splat(0);
    for (int i = 0; i < block; i += 8) {
        const Floats values = max(min(load(x + i) * splat(inverse), splat(LARGEST_FIXED)), splat(-LARGEST_FIXED));
        const Ints whole = inverse ? round(values) : splat(0);
        total = total + whole;
        store(fixed.values + i, whole);
    }
    fixed.total = int32_t(sum(to_floats(total)));  // exact: below 2^23
}

// Row m of p.x, normed: `take(b, block)` gets each block.
template <class Take>
INLINE void fix_row(const QuantizedMatmul& p, int64_t m, Take take) {
    const QuantizedWeight& w = p.weight;
    const int64_t K = w.columns;
    Floats scale = splat(1.0f);
    if (p.norm) {
        Floats squares = splat(0.0f);
        for (int64_t k = 0; k < K; k += 8) {
            const Floats x = read8(p.x, p.type, m * K + k);
            squares = fma(x, x, squares);
        }
        scale = splat(1 / std::sqrt(sum(squares) / float(K) + p.eps));
    }
    for (int64_t start = 0; start < K; start += w.block) {
        float x[LARGEST_BLOCK];
        FixedBlock fixed;
        Floats most = splat(0.0f);
        for (int i = 0; i < w.block; i += 8) {
            Floats values = read8(p.x, p.type, m * K + start + i);
            if (p.norm) values = values * scale * read8(p.norm, p.type, start + i);
            most = max(most, abs(values));
            store(x + i, values);
        }
        fix_block(x, largest(most), w.block, fixed);
        take(start / w.block, fixed);
    }
}

}  // namespace mimo_fast::MIMO_FAST_SET
