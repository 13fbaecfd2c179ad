// Products of activations with weights of 4 or 8 bits, and what a layer does around them.
#pragma once

#include "parameters.h"

namespace mimo_fast::MIMO_FAST_SET {

void quantized_matmul(const QuantizedMatmul& p);

}  // namespace mimo_fast::MIMO_FAST_SET
