// One step of cached self-attention: rotate, append to the cache, attend.
#pragma once

#include "parameters.h"

namespace mimo_fast::MIMO_FAST_SET {

void decode_attention(const DecodeAttention& p);

// Its two halves for rows first ... last - 1, on this thread: all rows append before any of the same slot attends.
void append_rows(const DecodeAttention& p, int64_t first, int64_t last);
void attend_rows(const DecodeAttention& p, int64_t first, int64_t last);

}  // namespace mimo_fast::MIMO_FAST_SET
