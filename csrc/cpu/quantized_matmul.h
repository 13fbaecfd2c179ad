// Products of activations with weights of 4 or 8 bits on a CPU, and what a layer does around them.
#pragma once

#include "numbers.h"

namespace mimo_fast {

// y[M, F] = residual + f(normed x W^T + bias), W[n, k] = scale (q - zero) as mimo_fast/kernels/quantized_weight.py
// packs it. f is nothing, and F = N, or SwiGLU: W has the N / 2 rows of gate, then those of up, and F = N / 2.
struct QuantizedMatmul {
    const void* x;           // [M, K] of `type`
    void* y;                 // [M, F] of `type`
    const uint8_t* words;    // [N, K bits / 8], blocks of `block` columns
    const uint16_t* scales;  // bfloat16 [N, K / group]
    const uint16_t* zeros;   // float16 [N, K / group], or null for none
    const void* bias;        // [N] of `type`, or null for none
    const void* norm;        // weight [K] of `type` of an RMSNorm of x, or null for none
    const void* residual;    // [M, F] of `type`, or null for none
    float eps;               // of the norm
    bool swiglu;
    Type type;
    int bits;                // 4 or 8
    int block;               // columns packed together: 64 or 128 of 4 bits, 32, 64 or 128 of 8
    int64_t group;           // columns that share a scale, a multiple of `block`
    int64_t M, N, K;
};

void quantized_matmul(const QuantizedMatmul& p);

}  // namespace mimo_fast
