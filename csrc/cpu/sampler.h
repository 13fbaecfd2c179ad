// The law of mimo_fast/kernels/sample.py on a CPU: one id a row, without a sort.
#pragma once

#include <vector>

#include "numbers.h"

namespace mimo_fast {

// Settings of N rows, as `SamplerTensors` has them, and what names their noise.
struct SamplerRows {
    const float* temperature;
    const int64_t* top_k;
    const float* tail;
    const bool* greedy;
    const int64_t* seeds;
    const int64_t* draws;
};

class Sampler {
  public:
    // One id of logits [size]. banned: [size] or null for none; never: one more id that may not be drawn, or -1.
    // Noise is that of slot `slot` and of ids `first` ... first + size - 1.
    int64_t draw(
        const float* logits, int64_t size, const bool* banned, int64_t never, const SamplerRows& rows, int64_t row,
        uint32_t slot, uint32_t first
    );

  private:
    std::vector<float> scores, noise, mass;
    std::vector<int32_t> bits;

    void keep_top_k(int64_t size, int64_t k);
};

// Standard Gumbel noise of `count` ids from `first` on.
void gumbel(int64_t seed, int64_t draw, uint32_t slot, uint32_t first, int64_t count, float* noise);

}  // namespace mimo_fast
