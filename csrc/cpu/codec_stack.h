// A stack of the codec's layers in float32 in one call: pre-norm, biased projections, GELU, attention in a buffer.
#pragma once

#include "buffer.h"
#include "parameters.h"

namespace mimo_fast::MIMO_FAST_SET {

// x [T, dim], replaced by what the last layer gives.
void run_codec_stack(const CodecStack& stack, float* x, int64_t T, const CodecAttention& attention);

// x [sum of lengths, dim], replaced by what the last layer gives, plus what layer `skip` gives, counted from 1; 0 for none.
// Rows are divided among threads where there is enough work; a sequence's bits do not depend on that, nor on the others.
void run_codec_sequences(const CodecStack& stack, float* x, const CodecSequences& sequences, int64_t skip);

// Multiplications with the weights of its layers for a row.
int64_t stack_work(const CodecStack& stack);

// Its parts: a norm of x [T, dim], and what follows attention in a layer, on x [T, dim] in place. normed holds T rows.
void apply_norm(const Norm& norm, float eps, const float* x, int64_t T, int64_t dim, float* y);
void finish_layer(const CodecStack& stack, const CodecLayer& layer, const float* attended, int64_t T, float* x,
                  float* normed, Buffer<float>& wide);

}  // namespace mimo_fast::MIMO_FAST_SET
