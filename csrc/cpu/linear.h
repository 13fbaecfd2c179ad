// A stored matrix, dense or quantized, and its products with float32 rows.
#pragma once

#include <vector>

#include "dense_matmul.h"
#include "quantized_matmul.h"

namespace mimo_fast {

// [rows, columns]: dense blocks of rows one below the other, or quantized where there are none.
struct Linear {
    std::vector<DenseBlock> blocks;
    QuantizedMatmul quantized = {};  // what a call does not change
    int64_t rows = 0, columns = 0;
};

// y[M, rows] = x[M, columns] W^T + bias.
void multiply(const Linear& w, const float* x, int64_t M, float* y);

// y += x W^T + bias; scratch holds M rows of y.
void add_multiply(const Linear& w, const float* x, int64_t M, float* y, float* scratch);

}  // namespace mimo_fast
