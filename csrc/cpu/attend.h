// Softmax attention of one float32 query over the keys and values at given places.
#pragma once

#include "buffer.h"
#include "simd.h"

namespace mimo_fast::MIMO_FAST_SET {

// The head [2 half] at x, rotated in place by cosines and sines [half].
INLINE void rotate_head(float* x, const float* cosines, const float* sines, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cosines[i] - b * sines[i];
        x[half + i] = b * cosines[i] + a * sines[i];
    }
}

// y[head_dim] = sum_j softmax_j(q . k_j / sqrt(head_dim)) v_j over j in the `count` places; key and value j are `stride`
// apart. weights: scratch. head_dim is a multiple of 8; without places y is 0.
void attend(
    const float* q, const float* k, const float* v, const int64_t* places, int64_t count, int64_t stride,
    int64_t head_dim, Buffer<float>& weights, float* y
);

// y[R, 8 N] += weights[R, count] v[count, 8 N]; weights of a query are `width` apart.
template <int R, int N>
INLINE void add_values(
    const float* weights, int64_t width, const float* v, int64_t stride, int64_t count, float* y, int64_t y_stride
) {
    Floats sums[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) sums[r][n] = load(y + r * y_stride + 8 * n);
    for (int64_t j = 0; j < count; ++j) {
        Floats wide[N];
        for (int n = 0; n < N; ++n) wide[n] = load(v + j * stride + 8 * n);
        for (int r = 0; r < R; ++r) {
            const Floats weight = splat(weights[r * width + j]);
            for (int n = 0; n < N; ++n) sums[r][n] = fma(weight, wide[n], sums[r][n]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) store(y + r * y_stride + 8 * n, sums[r][n]);
}

// The same of whole heads.
template <int R>
INLINE void add_run(
    const float* weights, int64_t width, const float* v, int64_t stride, int64_t count, int64_t head_dim, float* y,
    int64_t y_stride
) {
    int64_t i = 0;
    for (; i + 16 <= head_dim; i += 16) add_values<R, 2>(weights, width, v + i, stride, count, y + i, y_stride);
    for (; i < head_dim; i += 8) add_values<R, 1>(weights, width, v + i, stride, count, y + i, y_stride);
}

// Queries that `attend_runs` computes together: they share keys and values. Where windows differ, which ones share them
// decides the order of a query's sums.
constexpr int TOGETHER = 4;

// Keys and values of `count` places that follow one another, `stride` apart.
struct Run {
    const float *k, *v;
    int64_t stride, count;
};

// `attend` of some queries of one head, `q_stride` apart, over the places of two runs, one after the other: query r sees
// places from[r] ... to[r] - 1, at least one. Results are `y_stride` apart. scratch: any buffer.
void attend_runs(
    const float* q, int64_t q_stride, int64_t queries, const Run (&runs)[2], const int64_t* from, const int64_t* to,
    int64_t head_dim, Buffer<float>& scratch, float* y, int64_t y_stride
);

}  // namespace mimo_fast::MIMO_FAST_SET
