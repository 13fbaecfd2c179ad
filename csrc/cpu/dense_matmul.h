// Products of a few float32 rows with float32 weights as they lie, and the norms around them.
#pragma once

#include "parameters.h"

namespace mimo_fast::MIMO_FAST_SET {

// y[M, rows] = x[M, columns] W^T + bias, `y` rows `stride` apart; columns a multiple of 8. A row of y does not depend on
// the other rows.
void dense_matmul(const DenseBlock& w, int64_t columns, const float* x, int64_t M, float* y, int64_t stride);

// `count` rows of `columns` values, `stride` apart.
struct Rows {
    const float* values;
    int64_t stride, columns, count;

    const float* at(int64_t row) const { return values + row * stride; }
};

// y[x.count, w.count] = x w^T + bias, or none; columns a multiple of 8, y rows `stride` apart. Bits as `dense_matmul`'s.
void strided_matmul(const Rows& w, const float* bias, const Rows& x, float* y, int64_t stride);

// y[M, K] = x / sqrt(mean(x^2) + eps) weight; K a multiple of 8.
void rms_norm(const float* x, const float* weight, float eps, int64_t M, int64_t K, float* y);

// y[M, K] = (x - mean(x)) / sqrt(var(x) + eps) weight + bias; K a multiple of 8.
void layer_norm(
    const float* x, const float* weight, const float* bias, float eps, int64_t M, int64_t K, float* y
);

}  // namespace mimo_fast::MIMO_FAST_SET
