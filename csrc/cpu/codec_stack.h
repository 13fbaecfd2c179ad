// A stack of the codec's layers in float32 in one call: pre-norm, biased projections, GELU, attention in a buffer.
#pragma once

#include "parameters.h"

namespace mimo_fast::MIMO_FAST_SET {

// x [T, dim], replaced by what the last layer gives.
void run_codec_stack(const CodecStack& stack, float* x, int64_t T, const CodecAttention& attention);

}  // namespace mimo_fast::MIMO_FAST_SET
