// Products of activations with weights of 4 or 8 bits on a CPU.
#pragma once

#include <cstdint>

namespace mimo_fast {

enum class Type : int { float32, bfloat16 };

// y[M, N] = x[M, K] W^T + bias, W[n, k] = scale (q - zero) as mimo_fast/kernels/quantized_weight.py packs it.
struct QuantizedMatmul {
    const void* x;           // [M, K] of `type`
    void* y;                 // [M, N] of `type`
    const uint8_t* words;    // [N, K bits / 8], blocks of `block` columns
    const uint16_t* scales;  // bfloat16 [N, K / group]
    const uint16_t* zeros;   // float16 [N, K / group], or null for none
    const void* bias;        // [N] of `type`, or null for none
    Type type;
    int bits;                // 4 or 8
    int block;               // columns packed together: 64 or 128 of 4 bits, 32, 64 or 128 of 8
    int64_t group;           // columns that share a scale, a multiple of `block`
    int64_t M, N, K;
};

// Whether this machine has the instructions.
bool quantized_matmul_runs();

void quantized_matmul(const QuantizedMatmul& p);

}  // namespace mimo_fast
