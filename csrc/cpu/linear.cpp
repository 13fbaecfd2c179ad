#include "linear.h"

namespace mimo_fast {

void multiply(const Linear& w, const float* x, int64_t M, float* y) {
    if (w.blocks.empty()) {
        QuantizedMatmul p = w.quantized;
        p.x = x, p.y = y, p.M = M;
        return quantized_matmul(p);
    }
    int64_t at = 0;
    for (const DenseBlock& block : w.blocks) {
        dense_matmul(block, w.columns, x, M, y + at, w.rows);
        at += block.rows;
    }
}

void add_multiply(const Linear& w, const float* x, int64_t M, float* y, float* scratch) {
    if (w.blocks.empty()) {
        QuantizedMatmul p = w.quantized;
        p.x = x, p.y = y, p.residual = y, p.M = M;
        return quantized_matmul(p);
    }
    multiply(w, x, M, scratch);
    for (int64_t i = 0; i < M * w.rows; ++i) y[i] += scratch[i];
}

}  // namespace mimo_fast
