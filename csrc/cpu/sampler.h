// Sampling as in mimo_fast/kernels/sample.py, on a CPU: one id a row, without a sort.
#pragma once

#include "buffer.h"
#include "parameters.h"

namespace mimo_fast::MIMO_FAST_SET {

// The id of a row whose logits hold NaN or +inf, or where every id that may be drawn has -inf.
constexpr int64_t NOT_FINITE = -1;

class Sampler {
  public:
    // One id of logits [size], or NOT_FINITE. banned: [size] or null for none; never: one more id that may not be drawn, or -1.
    // Noise is that of slot `slot` and of ids `first` ... first + size - 1.
    int64_t draw(
        const float* logits, int64_t size, const bool* banned, int64_t never, const SamplerRows& rows, int64_t row,
        uint32_t slot, uint32_t first
    );

  private:
    Buffer<float> scores, noise, mass;
    Buffer<int32_t> bits;

    void keep_top_k(int64_t size, int64_t k);
};

// One id of each row of logits.
void sample(const Logits& logits, const SamplerRows& settings, int64_t* ids);

// Standard Gumbel noise of `count` ids from `first` on.
void gumbel(int64_t seed, int64_t draw, uint32_t slot, uint32_t first, int64_t count, float* noise);

}  // namespace mimo_fast::MIMO_FAST_SET
