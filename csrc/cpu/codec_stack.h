// A stack of the codec's layers in float32 in one call: pre-norm, biased projections, GELU, attention in a buffer.
#pragma once

#include <vector>

#include "linear.h"

namespace mimo_fast {

// LayerNorm, or RMSNorm where there is no bias.
struct Norm {
    const float* weight;
    const float* bias;
};

struct CodecLayer {
    Norm attention_norm;
    Linear qkv, out;
    Norm ffn_norm;
    Linear up, down;
};

struct CodecStack {
    std::vector<CodecLayer> layers;
    int64_t dim, heads;
    float eps;  // of the norms
};

// What T rows attend to. The key and value of row t go to place slots[t] first, in every layer.
struct CodecAttention {
    const float* table;   // [2, T, head_dim / 2]: cosines and sines of the rows' positions
    float* k;             // [layers, heads, places, head_dim], contiguous
    float* v;
    const int64_t* slots;  // [T]
    const bool* visible;   // [T, places]
    int64_t places;
};

// x [T, dim], replaced by what the last layer gives.
void run_codec_stack(const CodecStack& stack, float* x, int64_t T, const CodecAttention& attention);

}  // namespace mimo_fast
