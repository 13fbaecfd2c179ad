// Tables of a codec's decoder, computed once when it is made.
#pragma once

#include "parameters.h"

namespace mimo_fast {

// Cosines and sines of positions 0 ... count - 1 in double precision.
Rotations make_rotations(const float* frequencies, int64_t half, int64_t count);

// window [size]; size even.
InverseStft make_inverse_stft(const float* window, int64_t size, int64_t hop);

}  // namespace mimo_fast
