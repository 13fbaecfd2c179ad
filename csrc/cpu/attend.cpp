#include "attend.h"

#include "activations.h"

namespace mimo_fast::MIMO_FAST_SET {
namespace {

// Sum of weighted values, 8 N of them.
template <int N>
INLINE void sum_values(
    const float* v, const int64_t* places, int64_t count, int64_t stride, const float* weights, float scale, float* y
) {
    Floats sums[N];
    for (int n = 0; n < N; ++n) sums[n] = splat(0.0f);
    for (int64_t j = 0; j < count; ++j) {
        const Floats weight = splat(weights[j]);
        for (int n = 0; n < N; ++n) sums[n] = fma(weight, load(v + places[j] * stride + 8 * n), sums[n]);
    }
    for (int n = 0; n < N; ++n) store(y + 8 * n, sums[n] * splat(scale));
}

// Scores of N keys at once.
template <int N>
INLINE void score(
    const float* q, const float* k, const int64_t* places, int64_t stride, int64_t head_dim, float scale, float* scores
) {
    Floats sums[N];
    for (int n = 0; n < N; ++n) sums[n] = splat(0.0f);
    for (int64_t i = 0; i < head_dim; i += 8) {
        const Floats query = load(q + i);
        for (int n = 0; n < N; ++n) sums[n] = fma(query, load(k + places[n] * stride + i), sums[n]);
    }
    for (int n = 0; n < N; ++n) scores[n] = sum(sums[n]) * scale;
}

}  // namespace

void attend(
    const float* q, const float* k, const float* v, const int64_t* places, int64_t count, int64_t stride,
    int64_t head_dim, Buffer<float>& scratch, float* y
) {
    for (int64_t i = 0; i < head_dim; ++i) y[i] = 0;
    if (!count) return;
    // Rounded up, so that exponentials are taken eight at once; those beyond count for nothing.
    const int64_t rounded = (count + 7) / 8 * 8;
    scratch.reserve(rounded);
    float* weights = scratch.data();
    for (int64_t i = count; i < rounded; ++i) weights[i] = -INFINITY;
    const float scale = 1 / std::sqrt(float(head_dim));
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) score<4>(q, k, places + j, stride, head_dim, scale, weights + j);
    for (; j < count; ++j) score<1>(q, k, places + j, stride, head_dim, scale, weights + j);
    float best = weights[0];
    for (int64_t i = 1; i < count; ++i) best = weights[i] > best ? weights[i] : best;
    for (int64_t i = 0; i < rounded; i += 8) store(weights + i, exp(load(weights + i) - splat(best)));
    float total = 0;
    for (int64_t i = 0; i < count; ++i) total += weights[i];
    int64_t i = 0;
    for (; i + 32 <= head_dim; i += 32) sum_values<4>(v + i, places, count, stride, weights, 1 / total, y + i);
    for (; i < head_dim; i += 8) sum_values<1>(v + i, places, count, stride, weights, 1 / total, y + i);
}

}  // namespace mimo_fast::MIMO_FAST_SET
