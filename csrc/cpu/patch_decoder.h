// All steps of a patch in one call: transformer, heads, draws and the next step's input.
#pragma once

#include "sampler.h"
#include "transformer.h"

namespace mimo_fast {

// As mimo_fast/kernels/sample_codes.py says of one step.
struct CodeStep {
    const int64_t* heads;  // [5, active]: channel, frame, first row in the table, size and empty id of each
    int64_t active;
};

struct PatchDecoder {
    Transformer transformer;
    const float* heads;       // [table rows, dim]
    const float* embeddings;  // [table rows, dim]
    int64_t channels, group_size;
    std::vector<CodeStep> steps;
};

// local [R, dim], the first input -> codes [R, channels, group_size].
void decode_patch(
    const PatchDecoder& p, const float* local, int64_t* codes, int64_t rows, const SamplerRows& settings
);

}  // namespace mimo_fast
