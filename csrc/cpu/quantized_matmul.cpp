// y = x W^T + b for few rows of x: the weights stream through once, by integer arithmetic.
//
// x in fixed point. Each block of x becomes x = s (256 h + l) with bytes h and l and a float s, so that the block's
// largest value is 127 * 256 s: an error of 2^-16 of that value, where bfloat16 has 2^-9 of each. Its products with q
// are then exact integers, summed over a block, and only blocks are added in float:
//
//     y[n] = sum over blocks of   scale s (sum of (q - offset) x  -  zero (sum of x))
//
// of which all but zero, where W has zeros, are integers. Block b is added to float b % 8, and the eight are added last,
// by `sum`. With more rows the order is the same (quantized_tiles.cpp).
//
// block_dot.h has the sums of q x for each instruction set, eight blocks at a time. With AVX2 one takes 31 instructions
// for the 128 weights of 64 bytes at 4 bits, 24 for those of 128 bytes at 8 bits; converting each weight to float and
// multiplying it there takes three times as many at 4 bits.
//
// x is permuted within each block to meet the weights as they are unpacked: bytes in order, low nibbles before high
// ones. A thread takes tiles of ROWS rows of W, so that a tile stays in its caches while many rows of x pass, two at a
// time: four rows of x would leave no room for W in a first cache of 32 KB.

#include "quantized_matmul.h"

#include "block_dot.h"
#include "buffer.h"
#include "fixed_point.h"
#include "quantized_finish.h"
#include "quantized_tiles.h"

namespace mimo_fast::MIMO_FAST_SET {
namespace {

constexpr int64_t ROWS = 16;

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

// All rows of x in fixed point; blocks up to a multiple of eight, of which those that x does not have are zero.
struct FixedPoint {
    const int64_t blocks;
    Buffer<int8_t> high, low;  // [M, K], for 4 bits where the set SPLITS_X
    Buffer<int16_t> whole;     // [M, K], otherwise
    Buffer<float> steps;       // [M, blocks]: s
    Buffer<int32_t> offsets;   // [M, blocks]: what offset and x have in the sum of a block
    Buffer<float> totals;      // [M, blocks]: sum of x, where W has zeros

    explicit FixedPoint(const QuantizedMatmul& p)
        : blocks((p.weight.columns / p.weight.block + 7) / 8 * 8),
          high(splits(p.weight) ? p.M * p.weight.columns : 0), low(high.size()),
          whole(splits(p.weight) ? 0 : p.M * p.weight.columns), steps(p.M * blocks), offsets(p.M * blocks),
          totals(p.weight.zeros ? p.M * blocks : 0) {
        const UnpackingOrder order(p.weight.bits, p.weight.block);
#pragma omp parallel for if (p.M > 4)
        for (int64_t m = 0; m < p.M; ++m) convert_row(p, order, m);
    }

    static bool splits(const QuantizedWeight& w) { return SPLITS_X && w.bits == 4; }

    void convert_row(const QuantizedMatmul& p, const UnpackingOrder& order, int64_t m) {
        const QuantizedWeight& w = p.weight;
        fix_row(p, m, [&](int64_t b, const FixedBlock& block) {
            steps[m * blocks + b] = block.step;
            offsets[m * blocks + b] = -(1 << (w.bits - 1)) * block.total;
            if (w.zeros) totals[m * blocks + b] = float(block.total);
            const int64_t at = m * w.columns + b * w.block;
            if (!splits(w)) {
                for (int i = 0; i < w.block; ++i) whole[at + i] = int16_t(block.values[order.order[i]]);
            } else {
                for (int i = 0; i < w.block; ++i) {
                    const int32_t value = block.values[order.order[i]], h = (value + 128) >> 8;
                    high[at + i] = int8_t(h);
                    low[at + i] = int8_t(value - 256 * h);
                }
            }
        });
    }
};

// A block of W with R rows of x, whose first is `at` and K values before the next.
template <int BITS, int BLOCK, int R>
INLINE void dot_block(const uint8_t* words, const FixedPoint& x, int64_t at, int64_t K, Ints (&out)[R]) {
    if constexpr (BITS == 8) dot_8_bits<BLOCK, R>(words, x.whole.data() + at, K, out);
    else if constexpr (SPLITS_X) dot_4_bits<BLOCK, R>(words, x.high.data() + at, x.low.data() + at, K, out);
    else dot_4_bits<BLOCK, R>(words, x.whole.data() + at, K, out);
}

// Values of blocks b ... b + count - 1 from those of groups, in `each` where they do not lie so in memory.
INLINE const uint16_t* of_blocks(
    const QuantizedWeight& w, const uint16_t* groups, int64_t b, int64_t count, uint16_t (&each)[8]
) {
    if (count == 8 && w.group == w.block) return groups + b;
    const int64_t blocks_of_group = w.group / w.block;
    for (int64_t i = 0; i < 8; ++i) each[i] = i < count ? groups[(b + i) / blocks_of_group] : 0;
    return each;
}

// Row n of W with rows m ... m + R - 1 of x, and the bias.
template <int BITS, int BLOCK, int R>
INLINE void dot_row(const QuantizedMatmul& p, const FixedPoint& x, int64_t m, int64_t n, float (&y)[R]) {
    const QuantizedWeight& w = p.weight;
    const int64_t K = w.columns, groups = K / w.group;
    const uint8_t* words = w.words + n * (K * BITS / 8);
    Floats sums[R];
    for (int r = 0; r < R; ++r) sums[r] = splat(0.0f);
    const auto add_blocks = [&](int64_t b, int64_t count) __attribute__((always_inline)) {
        Ints dots[R][8];
#pragma GCC unroll 8
        for (int64_t i = 0; i < count; ++i) {
            Ints block[R];
            dot_block<BITS, BLOCK, R>(words + (b + i) * (BLOCK * BITS / 8), x, m * K + (b + i) * BLOCK, K, block);
            for (int r = 0; r < R; ++r) dots[r][i] = block[r];
        }
        for (int64_t i = count; i < 8; ++i)
            for (int r = 0; r < R; ++r) dots[r][i] = splat(0);
        uint16_t each[8];
        const Floats scales = load_bfloat16(of_blocks(w, w.scales + n * groups, b, count, each));
        Floats zeros = splat(0.0f);
        if (w.zeros) zeros = load_float16(of_blocks(w, w.zeros + n * groups, b, count, each));
        for (int r = 0; r < R; ++r) {
            const int64_t at = (m + r) * x.blocks + b;
            Floats dot = to_floats(each_sum(dots[r]) + load(x.offsets.data() + at));
            if (w.zeros) dot = fnma(zeros, load(x.totals.data() + at), dot);
            sums[r] = fma(dot, scales * load(x.steps.data() + at), sums[r]);
        }
    };
    int64_t b = 0;
    for (; (b + 8) * BLOCK <= K; b += 8) add_blocks(b, 8);
    if (b * BLOCK < K) add_blocks(b, K / BLOCK - b);
    for (int r = 0; r < R; ++r) y[r] = sum(sums[r]) + (p.bias ? read(p.bias, p.type, n) : 0);
}

// Outputs first ... last - 1, at most ROWS, of rows m ... m + R - 1.
template <int BITS, int BLOCK, int R>
void dot_rows(const QuantizedMatmul& p, const FixedPoint& x, int64_t m, int64_t first, int64_t last) {
    const int64_t outputs = p.swiglu ? p.weight.rows / 2 : p.weight.rows;
    float values[R][ROWS] = {}, up[R][ROWS] = {};
    const auto multiply = [&](int64_t row, float (&to)[R][ROWS]) {
        for (int64_t i = 0; i < last - first; ++i) {
            float y[R];
            dot_row<BITS, BLOCK, R>(p, x, m, row + i, y);
            for (int r = 0; r < R; ++r) to[r][i] = y[r];
        }
    };
    multiply(first, values);
    if (p.swiglu) multiply(outputs + first, up);
    for (int r = 0; r < R; ++r) finish_row(p, m + r, first, last - first, values[r], up[r]);
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
