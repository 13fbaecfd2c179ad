// A stack of the codec's layers in float32 in one call: pre-norm, biased projections, GELU, attention in a buffer.
#pragma once

#include "buffer.h"
#include "parameters.h"

namespace mimo_fast::MIMO_FAST_SET {

// x [T, dim], replaced by what the last layer gives.
void run_codec_stack(const CodecStack& stack, float* x, int64_t T, const CodecAttention& attention);

// Its parts: a norm of x [T, dim], and what follows attention in a layer, on x [T, dim] in place. normed holds T rows.
void apply_norm(const Norm& norm, float eps, const float* x, int64_t T, int64_t dim, float* y);
void finish_layer(const CodecStack& stack, const CodecLayer& layer, const float* attended, int64_t T, float* x,
                  float* normed, Buffer<float>& wide);

}  // namespace mimo_fast::MIMO_FAST_SET
