// A whole Qwen2-style transformer in float32 in one call, for models so small that calls are what they cost.
#pragma once

#include "parameters.h"

namespace mimo_fast::MIMO_FAST_SET {

// x [rows, dim] -> normed hidden states y [rows, dim]: each row appends to the cache, as `Positions` says, in every layer
// before any row attends: positions of a slot, one a row, see one another as causal attention does. x and y may be one.
void step(const Transformer& t, const float* x, float* y, const Cache& cache, const Positions& at);

// x [N, T, dim] -> normed hidden states y: each sequence attends to itself from position 0 on.
void encode(const Transformer& t, const float* x, float* y, int64_t sequences, int64_t length, bool causal);

}  // namespace mimo_fast::MIMO_FAST_SET
