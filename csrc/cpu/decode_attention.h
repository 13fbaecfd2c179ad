// One step of cached self-attention: rotate, append to the cache, attend.
#pragma once

#include "parameters.h"

namespace mimo_fast::MIMO_FAST_SET {

void decode_attention(const DecodeAttention& p);

}  // namespace mimo_fast::MIMO_FAST_SET
