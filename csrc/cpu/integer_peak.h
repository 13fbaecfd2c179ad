// What the products of quantized_matmul.h are compared with.
#pragma once

#include <cstdint>

namespace mimo_fast::MIMO_FAST_SET {

// Multiplies by the set's instructions on registers alone, `rounds` times; returns how many products of a value of x, of
// 16 bits, with a weight of 8 bits that was. 0, at once, in portable C++, where compilers choose the instructions.
int64_t multiply_registers(int64_t rounds);

}  // namespace mimo_fast::MIMO_FAST_SET
