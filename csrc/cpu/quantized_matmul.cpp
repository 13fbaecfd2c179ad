// y = x W^T + b for few rows of x: the weights stream through once, by integer arithmetic.
//
// x in fixed point. Each block of x becomes x = s (256 h + l) with bytes h and l and a float s, so that the block's
// largest value is 127 * 256 s: an error of 2^-16 of that value, where bfloat16 has 2^-9 of each. Its products with q
// are then exact integers, summed over a block, and only blocks are added in float:
//
//     y[n] = sum over blocks   scale s (sum q x)  -  sum over groups   scale (offset + zero) t,      t = sum of s x
//
// block_dot.h has those products for each instruction set. With AVX2 they are 31 instructions for the 128 weights of 64
// bytes at 4 bits, 24 for those of 128 bytes at 8 bits; converting each weight to float and multiplying it there takes
// three times as many at 4 bits.
//
// x is permuted within each block to meet the weights as they are unpacked: bytes in order, low nibbles before high
// ones. A thread takes tiles of ROWS rows of W, so that a tile stays in its caches while many rows of x pass, two at a
// time: four rows of x would leave no room for W in a first cache of 32 KB.

#include "quantized_matmul.h"

#include "block_dot.h"
#include "buffer.h"
#include "fixed_point.h"
#include "quantized_tiles.h"

namespace mimo_fast::MIMO_FAST_SET {
namespace {

constexpr int64_t ROWS = 16;
// Bytes of W below which waking the other threads costs more than they bring.
constexpr int64_t SHARED = 1 << 17;

// order[i]: column of a block that meets byte or nibble i of its weights, in the order in which they are unpacked.
struct UnpackingOrder {
    int order[LARGEST_BLOCK];

    UnpackingOrder(int bits, int block) {
        const int planes = 32 / bits, words = block / planes;
        const int at_once = block == 128 ? NIBBLE_BYTES<128> : NIBBLE_BYTES<64>;
        for (int column = 0; column < block; ++column) {
            const int word = column % words, plane = column / words;
            if (bits == 8) {
                order[4 * word + plane] = column;
            } else {
                const int byte = 4 * word + plane / 2;
                order[byte / at_once * 2 * at_once + plane % 2 * at_once + byte % at_once] = column;
            }
        }
    }
};

// All rows of x in fixed point.
struct FixedPoint {
    Buffer<int8_t> high, low;  // [M, K], for 4 bits where the set SPLITS_X
    Buffer<int16_t> whole;     // [M, K], otherwise
    Buffer<float> steps;       // [M, K / block]: s
    Buffer<float> sums;        // [M, K / group]: t

    explicit FixedPoint(const QuantizedMatmul& p)
        : high(splits(p.weight) ? p.M * p.weight.columns : 0), low(high.size()),
          whole(splits(p.weight) ? 0 : p.M * p.weight.columns), steps(p.M * (p.weight.columns / p.weight.block)),
          sums(p.M * (p.weight.columns / p.weight.group)) {
        const UnpackingOrder order(p.weight.bits, p.weight.block);
#pragma omp parallel for if (p.M > 4)
        for (int64_t m = 0; m < p.M; ++m) convert_row(p, order, m);
    }

    static bool splits(const QuantizedWeight& w) { return SPLITS_X && w.bits == 4; }

    void convert_row(const QuantizedMatmul& p, const UnpackingOrder& order, int64_t m) {
        const QuantizedWeight& w = p.weight;
        const int64_t blocks = w.columns / w.block;
        fix_row(p, m, sums.data() + m * (w.columns / w.group), [&](int64_t b, const int32_t* fixed, float step) {
            steps[m * blocks + b] = step;
            const int64_t at = m * w.columns + b * w.block;
            if (!splits(w)) {
                for (int i = 0; i < w.block; ++i) whole[at + i] = int16_t(fixed[order.order[i]]);
            } else {
                for (int i = 0; i < w.block; ++i) {
                    const int32_t value = fixed[order.order[i]], h = (value + 128) >> 8;
                    high[at + i] = int8_t(h);
                    low[at + i] = int8_t(value - 256 * h);
                }
            }
        });
    }
};

// Subtracts sum of scale (offset + zero) t over the groups of row n from each of R results.
template <int R>
INLINE void subtract_zeros(const QuantizedWeight& w, int64_t n, const float* sums, float (&y)[R]) {
    const int64_t groups = w.columns / w.group;
    const uint16_t *scales = w.scales + n * groups, *zeros = w.zeros ? w.zeros + n * groups : nullptr;
    const float offset = float(1 << (w.bits - 1));
    Floats wide[R];
    for (int r = 0; r < R; ++r) wide[r] = splat(0.0f);
    int64_t g = 0;
    for (; g + 8 <= groups; g += 8) {
        Floats zero = splat(offset);
        if (zeros) zero = zero + load_float16(zeros + g);
        const Floats product = load_bfloat16(scales + g) * zero;
        for (int r = 0; r < R; ++r) wide[r] = fma(product, load(sums + r * groups + g), wide[r]);
    }
    for (int r = 0; r < R; ++r) y[r] -= sum(wide[r]);
    for (; g < groups; ++g) {
        const float product = from_bfloat16(scales[g]) * (offset + (zeros ? from_float16(zeros[g]) : 0));
        for (int r = 0; r < R; ++r) y[r] -= product * sums[r * groups + g];
    }
}

// A block of W with R rows of x, whose first is `at` and K values before the next.
template <int BITS, int BLOCK, int R>
INLINE void dot_block(const uint8_t* words, const FixedPoint& x, int64_t at, int64_t K, Ints (&out)[R]) {
    if constexpr (BITS == 8) dot_8_bits<BLOCK, R>(words, x.whole.data() + at, K, out);
    else if constexpr (SPLITS_X) dot_4_bits<BLOCK, R>(words, x.high.data() + at, x.low.data() + at, K, out);
    else dot_4_bits<BLOCK, R>(words, x.whole.data() + at, K, out);
}

// Row n of W with rows m ... m + R - 1 of x, and the bias.
template <int BITS, int BLOCK, int R>
INLINE void dot_row(const QuantizedMatmul& p, const FixedPoint& x, int64_t m, int64_t n, float (&y)[R]) {
    const QuantizedWeight& w = p.weight;
    const int64_t K = w.columns, blocks = K / BLOCK, groups = K / w.group, blocks_of_group = w.group / BLOCK;
    const uint8_t* words = w.words + n * (K * BITS / 8);
    const uint16_t* scales = w.scales + n * groups;
    const float* steps = x.steps.data() + m * blocks;
    Floats sums[R];
    for (int r = 0; r < R; ++r) sums[r] = splat(0.0f);
    for (int64_t g = 0, b = 0; g < groups; ++g) {
        const float scale = from_bfloat16(scales[g]);
        for (int64_t end = b + blocks_of_group; b < end; ++b, words += BLOCK * BITS / 8) {
            const int64_t at = m * K + b * BLOCK;
            Ints dots[R];
            dot_block<BITS, BLOCK, R>(words, x, at, K, dots);
            for (int r = 0; r < R; ++r)
                sums[r] = fma(to_floats(dots[r]), splat(scale * steps[r * blocks + b]), sums[r]);
        }
    }
    for (int r = 0; r < R; ++r) y[r] = sum(sums[r]) + (p.bias ? read(p.bias, p.type, n) : 0);
    subtract_zeros<R>(w, n, x.sums.data() + m * groups, y);
}

// Outputs first ... last - 1 of rows m ... m + R - 1.
template <int BITS, int BLOCK, int R>
void dot_rows(const QuantizedMatmul& p, const FixedPoint& x, int64_t m, int64_t first, int64_t last) {
    const int64_t outputs = p.swiglu ? p.weight.rows / 2 : p.weight.rows;
    for (int64_t n = first; n < last; ++n) {
        float y[R];
        dot_row<BITS, BLOCK, R>(p, x, m, n, y);
        if (p.swiglu) {
            float up[R];
            dot_row<BITS, BLOCK, R>(p, x, m, n + outputs, up);
            for (int r = 0; r < R; ++r) y[r] = y[r] / (1 + std::exp(-y[r])) * up[r];
        }
        for (int r = 0; r < R; ++r) {
            const int64_t at = (m + r) * outputs + n;
            write(p.y, p.type, at, p.residual ? y[r] + read(p.residual, p.type, at) : y[r]);
        }
    }
}

template <int BITS, int BLOCK>
void run(const QuantizedMatmul& p) {
    const FixedPoint x(p);
    const int64_t outputs = p.swiglu ? p.weight.rows / 2 : p.weight.rows, tiles = (outputs + ROWS - 1) / ROWS;
    const int64_t bytes = p.weight.rows * p.weight.columns * BITS / 8;
#pragma omp parallel for schedule(static) if (bytes * least(p.M, 8) > SHARED)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = tile * ROWS, last = least(first + ROWS, outputs);
        int64_t m = 0;
        for (; m + 2 <= p.M; m += 2) dot_rows<BITS, BLOCK, 2>(p, x, m, first, last);
        if (p.M > m) dot_rows<BITS, BLOCK, 1>(p, x, m, first, last);
    }
}

}  // namespace

void quantized_matmul(const QuantizedMatmul& p) {
    if (multiply_by_tiles(p)) return;
    const int block = p.weight.block;
    if (p.weight.bits == 4) block == 128 ? run<4, 128>(p) : run<4, 64>(p);
    else if (block == 128) run<8, 128>(p);
    else block == 64 ? run<8, 64>(p) : run<8, 32>(p);
}

}  // namespace mimo_fast::MIMO_FAST_SET
