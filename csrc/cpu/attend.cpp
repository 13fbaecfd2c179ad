#include "attend.h"

#include "activations.h"
#include "dense_matmul.h"

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

// Exponentials of the scores first ... last - 1 of a row of `width`, 0 elsewhere, which add up to 1.
void soften(float* scores, int64_t width, int64_t first, int64_t last, float scale) {
    for (int64_t i = 0; i < first; ++i) scores[i] = -INFINITY;
    for (int64_t i = last; i < width; ++i) scores[i] = -INFINITY;
    Floats wide = splat(-INFINITY);
    for (int64_t i = 0; i < width; i += 8) wide = max(wide, load(scores + i));
    const Floats best = splat(largest(wide) * scale), factor = splat(scale);
    Floats total = splat(0.0f);
    for (int64_t i = 0; i < width; i += 8) {
        const Floats weight = exp(load(scores + i) * factor - best);
        store(scores + i, weight);
        total = total + weight;
    }
    const Floats share = splat(1 / sum(total));
    for (int64_t i = 0; i < width; i += 8) store(scores + i, load(scores + i) * share);
}

// At most TOGETHER queries.
void attend_few(
    const float* q, int64_t q_stride, int64_t queries, const Run (&runs)[2], const int64_t* from, const int64_t* to,
    int64_t head_dim, Buffer<float>& scratch, float* y, int64_t y_stride
) {
    int64_t first = from[0], last = to[0];
    for (int64_t r = 1; r < queries; ++r) {
        first = least(first, from[r]);
        last = most(last, to[r]);
    }
    // Rounded up, so that exponentials are taken eight at once.
    const int64_t width = (last - first + 7) / 8 * 8;
    scratch.reserve(TOGETHER * width);
    float* scores = scratch.data();
    Run seen[2];
    for (int64_t i = 0, begin = 0, at = 0; i < 2; begin += runs[i++].count) {
        const int64_t skipped = most(0, first - begin), end = least(runs[i].count, last - begin);
        seen[i] = {runs[i].k + skipped * runs[i].stride, runs[i].v + skipped * runs[i].stride, runs[i].stride,
                   most(0, end - skipped)};
        strided_matmul({seen[i].k, seen[i].stride, head_dim, seen[i].count}, nullptr, {q, q_stride, head_dim, queries},
                       scores + at, width);
        at += seen[i].count;
    }
    const float scale = 1 / std::sqrt(float(head_dim));
    for (int64_t r = 0; r < queries; ++r) {
        soften(scores + r * width, width, from[r] - first, to[r] - first, scale);
        for (int64_t i = 0; i < head_dim; ++i) y[r * y_stride + i] = 0;
    }
    for (const Run& run : seen) {
        if (queries == TOGETHER)
            add_run<TOGETHER>(scores, width, run.v, run.stride, run.count, head_dim, y, y_stride);
        else
            for (int64_t r = 0; r < queries; ++r)
                add_run<1>(scores + r * width, width, run.v, run.stride, run.count, head_dim, y + r * y_stride, 0);
        scores += run.count;
    }
}

}  // namespace

void attend_runs(
    const float* q, int64_t q_stride, int64_t queries, const Run (&runs)[2], const int64_t* from, const int64_t* to,
    int64_t head_dim, Buffer<float>& scratch, float* y, int64_t y_stride
) {
    for (int64_t r = 0; r < queries; r += TOGETHER)
        attend_few(q + r * q_stride, q_stride, least(TOGETHER, queries - r), runs, from + r, to + r, head_dim, scratch,
                   y + r * y_stride, y_stride);
}

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
