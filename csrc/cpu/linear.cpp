#include "linear.h"

#include <omp.h>

#include "buffer.h"
#include "dense_matmul.h"
#include "quantized_matmul.h"
#include "threads.h"

namespace mimo_fast::MIMO_FAST_SET {

QuantizedMatmul product(const Linear& w, const float* x, int64_t M, float* y) {
    QuantizedMatmul p;
    p.weight = w.quantized;
    p.bias = w.quantized_bias;
    p.x = x;
    p.y = y;
    p.M = M;
    return p;
}

void adapt(const Linear& w, const float* x, int64_t M, float* y) {
    Buffer<float> inner, outer;
    for (const LowRank& part : w.added) {
        inner.reserve(M * part.rank);
        outer.reserve(M * part.rows);
        dense_matmul({part.a, nullptr, part.rank}, w.columns, x, M, inner.data(), part.rank);
        dense_matmul({part.b, nullptr, part.rows}, part.rank, inner.data(), M, outer.data(), part.rows);
        for (int64_t m = 0; m < M; ++m)
            for (int64_t i = 0; i < part.rows; ++i) y[m * w.rows + part.first + i] += outer[m * part.rows + i];
    }
    if (!w.factor) return;
    for (int64_t m = 0; m < M; ++m, y += w.rows)
        for (int64_t i = 0; i < w.rows; ++i) y[i] = y[i] * w.factor[i] + (w.last_bias ? w.last_bias[i] : 0);
}

void multiply(const Linear& w, const float* x, int64_t M, float* y) {
    int64_t at = 0;
    for (const DenseBlock& block : w.blocks) {
        dense_matmul(block, w.columns, x, M, y + at, w.rows);
        at += block.rows;
    }
    if (w.blocks.empty()) quantized_matmul(product(w, x, M, y));
    if (!w.added.empty()) adapt(w, x, M, y);
}

void multiply_rows(const Linear& w, const float* x, int64_t M, float* y) {
    const int threads = w.blocks.empty() ? 1 : threads_for(M, w.size());
    if (threads == 1) return multiply(w, x, M, y);
#pragma omp parallel num_threads(threads)
    {
        const int64_t count = omp_get_num_threads(), i = omp_get_thread_num(), first = M * i / count;
        multiply(w, x + first * w.columns, M * (i + 1) / count - first, y + first * w.rows);
    }
}

void add_multiply(const Linear& w, const float* x, int64_t M, float* y, float* scratch) {
    if (w.only_quantized()) {
        QuantizedMatmul p = product(w, x, M, y);
        p.residual = y;
        return quantized_matmul(p);
    }
    multiply(w, x, M, scratch);
    for (int64_t i = 0; i < M * w.rows; ++i) y[i] += scratch[i];
}

}  // namespace mimo_fast::MIMO_FAST_SET
