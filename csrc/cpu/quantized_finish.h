// What follows a quantized product, for tiles and row by row alike: SwiGLU, the residual, rounding.
#pragma once

#include "activations.h"

namespace mimo_fast::MIMO_FAST_SET {

// Bytes of W below which waking the other threads costs more than they bring.
constexpr int64_t SHARED = 1 << 17;

// Writes outputs first ... first + count - 1 of row m. gate: W x of them, with room up to a multiple of 8, which is
// overwritten; up: that of the other half of W with SwiGLU.
INLINE void finish_row(const QuantizedMatmul& p, int64_t m, int64_t first, int64_t count, float* gate, const float* up) {
    const int64_t outputs = p.swiglu ? p.weight.rows / 2 : p.weight.rows, at = m * outputs + first;
    for (int64_t i = 0; i < count && p.swiglu; i += 8) store(gate + i, silu(load(gate + i)) * load(up + i));
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const Floats values = load(gate + i);
        write8(p.y, p.type, at + i, p.residual ? values + read8(p.residual, p.type, at + i) : values);
    }
    for (; i < count; ++i)
        write(p.y, p.type, at + i, p.residual ? gate[i] + read(p.residual, p.type, at + i) : gate[i]);
}

}  // namespace mimo_fast::MIMO_FAST_SET
