#include "attend.h"

#include <algorithm>

namespace mimo_fast {
namespace {

// Sum of weighted values, N registers of them.
template <int N>
AVX2_INLINE void sum_values(
    const float* v, const std::vector<int64_t>& places, int64_t stride, const float* weights, float scale, float* y
) {
    __m256 sum[N] = {};
    for (size_t j = 0; j < places.size(); ++j) {
        const __m256 weight = _mm256_set1_ps(weights[j]);
        for (int n = 0; n < N; ++n)
            sum[n] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(v + places[j] * stride + 8 * n), sum[n]);
    }
    for (int n = 0; n < N; ++n) _mm256_storeu_ps(y + 8 * n, _mm256_mul_ps(sum[n], _mm256_set1_ps(scale)));
}

// Scores of `count` keys, N at once.
template <int N>
AVX2_INLINE void score(
    const float* q, const float* k, const int64_t* places, int64_t stride, int64_t head_dim, float scale, float* scores
) {
    __m256 sum[N] = {};
    for (int64_t i = 0; i < head_dim; i += 8) {
        const __m256 query = _mm256_loadu_ps(q + i);
        for (int n = 0; n < N; ++n)
            sum[n] = _mm256_fmadd_ps(query, _mm256_loadu_ps(k + places[n] * stride + i), sum[n]);
    }
    for (int n = 0; n < N; ++n) scores[n] = sum8(sum[n]) * scale;
}

}  // namespace

AVX2 void attend(
    const float* q, const float* k, const float* v, const std::vector<int64_t>& places, int64_t stride,
    int64_t head_dim, std::vector<float>& weights, float* y
) {
    const int64_t count = int64_t(places.size());
    std::fill_n(y, head_dim, 0.0f);
    if (!count) return;
    // Rounded up, so that exponentials are taken eight at once; those beyond count for nothing.
    weights.assign((count + 7) / 8 * 8, -INFINITY);
    const float scale = 1 / std::sqrt(float(head_dim));
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) score<4>(q, k, &places[j], stride, head_dim, scale, &weights[j]);
    for (; j < count; ++j) score<1>(q, k, &places[j], stride, head_dim, scale, &weights[j]);
    const __m256 largest = _mm256_set1_ps(*std::max_element(weights.begin(), weights.begin() + count));
    for (size_t i = 0; i < weights.size(); i += 8)
        _mm256_storeu_ps(&weights[i], exp8(_mm256_sub_ps(_mm256_loadu_ps(&weights[i]), largest)));
    float total = 0;
    for (int64_t i = 0; i < count; ++i) total += weights[i];
    int64_t i = 0;
    for (; i + 32 <= head_dim; i += 32) sum_values<4>(v + i, places, stride, weights.data(), 1 / total, y + i);
    for (; i < head_dim; i += 8) sum_values<1>(v + i, places, stride, weights.data(), 1 / total, y + i);
}

}  // namespace mimo_fast
