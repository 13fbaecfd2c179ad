// A whole Qwen2-style transformer in float32 in one call, for models so small that calls are what they cost.
#pragma once

#include <vector>

#include "linear.h"

namespace mimo_fast {

struct Layer {
    const float* attention_norm;
    Linear qkv, out;
    const float* ffn_norm;
    Linear gate_up, down;
};

struct Transformer {
    std::vector<Layer> layers;
    const float* norm;   // [dim], of the result
    float eps;
    const float* table;  // [2, positions, head_dim / 2]: cosines, sines
    int64_t positions, dim, heads, kv_heads, head_dim;

    int64_t qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
};

// Keys and values [layers, slots, kv_heads, capacity, head_dim] of one layout, strides in elements.
struct Cache {
    float *k, *v;
    int64_t capacity, layer_stride, slot_stride, head_stride, position_stride;
};

// x [R, dim] -> normed hidden states y [R, dim]: row r appends to position starts[r] of slot slots[r], as
// `decode_attention` says. x and y may be one.
void step(
    const Transformer& t, const float* x, float* y, const Cache& cache, const int64_t* slots, const int64_t* starts,
    int64_t rows
);

// x [N, T, dim] -> normed hidden states y: each sequence attends to itself from position 0 on.
void encode(const Transformer& t, const float* x, float* y, int64_t sequences, int64_t length, bool causal);

}  // namespace mimo_fast
