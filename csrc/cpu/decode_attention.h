// One step of cached self-attention on a CPU: rotate, append to the cache, attend.
#pragma once

#include "numbers.h"

namespace mimo_fast {

// As mimo_fast/kernels/decode_attention.py says. Strides are in elements; keys and values share them.
struct DecodeAttention {
    const void* qkv;        // [R, (heads + 2 kv_heads) head_dim] of `type`, rows `row_stride` apart
    const float* table;     // [2, positions, head_dim / 2]: cosines, sines
    void* k;                // [slots, kv_heads, capacity, head_dim] of `type`
    void* v;
    const int64_t* slots;   // [R]
    const int64_t* starts;  // [R]
    void* y;                // [R, heads head_dim] of `type`
    Type type;
    int64_t rows, heads, kv_heads, head_dim, positions, capacity;
    int64_t row_stride, slot_stride, head_stride, position_stride;
};

void decode_attention(const DecodeAttention& p);

}  // namespace mimo_fast
