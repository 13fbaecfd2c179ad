// y = x W^T for many rows of x.
#pragma once

#include "parameters.h"

namespace mimo_fast::MIMO_FAST_SET {

// `quantized_matmul` by tiles, bit for bit as row by row. False, and nothing is done, where rows are too few for that
// to be faster, or the instruction set has no tiles.
bool multiply_by_tiles(const QuantizedMatmul& p);

}  // namespace mimo_fast::MIMO_FAST_SET
