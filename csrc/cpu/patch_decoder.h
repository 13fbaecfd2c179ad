// All steps of a patch in one call: transformer, heads, draws and the next step's input.
#pragma once

#include "parameters.h"

namespace mimo_fast::MIMO_FAST_SET {

// local [rows, dim], the first input -> codes [rows, channels, group_size].
void decode_patch(const PatchDecoder& p, const float* local, int64_t* codes, const SamplerRows& settings);

}  // namespace mimo_fast::MIMO_FAST_SET
