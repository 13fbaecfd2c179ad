// Products of float32 rows with a stored matrix, dense or quantized.
#pragma once

#include "parameters.h"

namespace mimo_fast::MIMO_FAST_SET {

// A product of float32 rows x with a quantized `w`; norm, SwiGLU and residual are the caller's to set.
QuantizedMatmul product(const Linear& w, const float* x, int64_t M, float* y);

// y = (y + B (A x)) factor + last_bias of a `w` with an adapter, for y[M, rows] = x[M, columns] W^T + bias.
void adapt(const Linear& w, const float* x, int64_t M, float* y);

// y[M, rows] = x[M, columns] W^T + bias, and what an adapter makes of it. A row does not depend on the other rows.
void multiply(const Linear& w, const float* x, int64_t M, float* y);

// `multiply` that divides many rows among threads.
void multiply_rows(const Linear& w, const float* x, int64_t M, float* y);

// y += what `multiply` gives; scratch holds M rows of y.
void add_multiply(const Linear& w, const float* x, int64_t M, float* y, float* scratch);

}  // namespace mimo_fast::MIMO_FAST_SET
