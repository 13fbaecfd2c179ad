// Frames of a waveform from what a vocoder's head gives.
#pragma once

#include "buffer.h"
#include "simd.h"

namespace mimo_fast::MIMO_FAST_SET {

// head [T, size + 2], log-magnitudes and then phases -> windowed frames [T, size]. A frame does not depend on the others.
void inverse_stft(const InverseStft& stft, const float* head, int64_t T, float* frames);

}  // namespace mimo_fast::MIMO_FAST_SET
