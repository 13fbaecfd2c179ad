// y = x W^T + b for many rows of x, by the arithmetic of integers: W is unpacked once for up to SLAB rows.
//
// x is converted once, by tiles of TILE_ROWS rows whose blocks are interleaved as registers read them, in pieces of
// TILE_COLUMNS columns. A thread takes TILE_WEIGHTS rows of W, unpacks TILE_COLUMNS of them into its second cache, and
// multiplies every tile of x, which stays in the first cache, by each TILE_OUTPUTS of those rows. Sums wait in memory
// until the last column. What is fetched from other caches or memory is then, an instruction that multiplies, a few
// bytes. The next weights are prefetched meanwhile.

#include "quantized_tiles.h"

#include "buffer.h"
#include "fixed_point.h"
#include "tile_dot.h"

namespace mimo_fast::MIMO_FAST_SET {

#if defined(MIMO_FAST_AVX2) || defined(MIMO_FAST_AVX512)

namespace {

constexpr int64_t SLAB = 256;      // rows of x at a time: their sums stay in a second cache of 512 KB
// Fewer are as fast row by row: 8 bits are not so much faster once they are unpacked.
constexpr int64_t LEAST_ROWS_4_BITS = 5, LEAST_ROWS_8_BITS = 10;
constexpr int64_t TILE_WEIGHTS = 2 * TILE_OUTPUTS;  // rows of W that are unpacked together
constexpr int64_t LINE = 64;       // bytes of a cache's line
// Bytes of W below which waking the other threads costs more than they bring.
constexpr int64_t SHARED = 1 << 17;

int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Some rows of x in fixed point.
template <int BITS, int BLOCK>
struct Slab {
    static constexpr int64_t PIECE = TILE_COLUMNS / BLOCK;             // blocks
    static constexpr int64_t WORDS = X_WORDS * BLOCK / (WORD_VALUES * SUMS);  // of a row, a block and a sum

    const QuantizedMatmul& p;
    const int64_t first, rows, tiles, blocks, groups;
    Aligned<uint32_t> x;    // [pieces, tiles, SUMS, blocks of a piece, rows of a tile, WORDS]
    Aligned<float> steps;   // [blocks, rows]: s
    Aligned<float> totals;  // [rows, groups]: t

    Slab(const QuantizedMatmul& p, int64_t first, int64_t rows)
        : p(p), first(first), rows(rows), tiles(parts(rows, TILE_ROWS)), blocks(p.weight.columns / BLOCK),
          groups(p.weight.columns / p.weight.group), x(rows * blocks * SUMS * WORDS), steps(blocks * rows),
          totals(rows * groups) {
#pragma omp parallel for schedule(dynamic)
        for (int64_t tile = 0; tile < tiles; ++tile)
            for (int64_t m = start(tile); m < start(tile + 1); ++m) convert(tile, m);
    }

    // The first row of a tile: rows are shared evenly, so that none is left with few.
    int64_t start(int64_t tile) const { return tile * rows / tiles; }
    int64_t piece_blocks(int64_t piece) const { return least(PIECE, blocks - piece * PIECE); }

    int64_t place(int64_t piece, int64_t tile) const {
        return SUMS * WORDS * (piece * PIECE * rows + start(tile) * piece_blocks(piece));
    }

    void convert(int64_t tile, int64_t m) {
        const int64_t rows_here = start(tile + 1) - start(tile), row = m - start(tile);
        fix_row(p, first + m, totals.data() + m * groups, [&](int64_t b, const int32_t* fixed, float step) {
            uint32_t words[SUMS * WORDS];
            pack_x<BITS, BLOCK>(fixed, words);
            const int64_t piece = b / PIECE, within = b % PIECE;
            uint32_t* to = x.data() + place(piece, tile) + (within * rows_here + row) * WORDS;
            for (int i = 0; i < SUMS; ++i, to += piece_blocks(piece) * rows_here * WORDS)
                std::memcpy(to, words + i * WORDS, WORDS * sizeof(uint32_t));
            steps[b * rows + m] = step;
        });
    }
};

// TILE_WEIGHTS rows of W with a slab.
template <int BITS, int BLOCK>
class Weights {
  public:
    explicit Weights(const Slab<BITS, BLOCK>& slab)
        : slab(slab), p(slab.p), w(slab.p.weight), outputs(p.swiglu ? w.rows / 2 : w.rows),
          weighed(TILE_WEIGHTS * slab.groups), biases(TILE_WEIGHTS), unpacked(SUMS * SUM_BYTES), scales(PIECE * TILE_OUTPUTS),
          products(PIECE * TILE_ROWS * TILE_OUTPUTS), sums(TILE_WEIGHTS / TILE_OUTPUTS * slab.tiles * TILE_SUMS) {}

    // Outputs that a tile has: with SwiGLU half of its rows are of gate, half of up.
    static int64_t width(const QuantizedMatmul& p) { return p.swiglu ? TILE_OUTPUTS : TILE_WEIGHTS; }

    void multiply(int64_t first_output) {
        first = first_output;
        prefetch_scales();
        for (int64_t piece = 0; piece * PIECE < slab.blocks; ++piece) {
            const bool last = (piece + 1) * PIECE >= slab.blocks;
            if (last) weigh_zeros();
            for (int64_t n = 0; n < TILE_WEIGHTS; n += TILE_OUTPUTS) {
                unpack_piece(piece, n);
                for (int64_t tile = 0; tile < slab.tiles; ++tile) {
                    prefetch(piece, n, tile);
                    if (last) prefetch_outputs(tile, n);
                    multiply_tile(piece, n, tile);
                    // Sums are still in the first cache.
                    if (last && !p.swiglu) finish_tile(tile, n, n + TILE_OUTPUTS);
                    else if (last && n + TILE_OUTPUTS == TILE_WEIGHTS) finish_tile(tile, 0, TILE_WEIGHTS);
                }
            }
        }
    }

  private:
    static constexpr int64_t PIECE = Slab<BITS, BLOCK>::PIECE, WORDS = Slab<BITS, BLOCK>::WORDS;
    static constexpr int64_t SUM_BYTES = TILE_COLUMNS / SUMS * TILE_OUTPUTS * 4 / WORD_VALUES;
    static constexpr int64_t TILE_SUMS = TILE_ROWS * SUMS * TILE_OUTPUTS;

    const Slab<BITS, BLOCK>& slab;
    const QuantizedMatmul& p;
    const QuantizedWeight& w;
    const int64_t outputs;
    int64_t first = 0;
    Aligned<float> weighed;     // [groups, TILE_WEIGHTS]: scale (offset + zero)
    Aligned<float> biases;      // [TILE_WEIGHTS]
    Aligned<uint8_t> unpacked;  // [SUMS, blocks of a piece, see unpack]
    Aligned<float> scales;      // [blocks of a piece, TILE_OUTPUTS]
    Aligned<float> products;    // [blocks of a piece, TILE_ROWS, TILE_OUTPUTS]: scales times steps
    Aligned<float> sums;        // [TILE_WEIGHTS / TILE_OUTPUTS, tiles, TILE_ROWS, SUMS, TILE_OUTPUTS]

    // The row of W that row i of the tile is; the last one's where there is none, whose result nobody reads.
    int64_t row_of(int64_t i) const {
        const int64_t half = width(p);
        return i / half * outputs + least(first + i % half, outputs - 1);
    }

    void unpack_piece(int64_t piece, int64_t n) {
        const int64_t blocks = slab.piece_blocks(piece), bytes = BLOCK * BITS / 8;
        const uint8_t* words[TILE_OUTPUTS];
        for (int64_t i = 0; i < TILE_OUTPUTS; ++i) {
            words[i] = w.words + (row_of(n + i) * slab.blocks + piece * PIECE) * bytes;
        }
        for (int64_t b = 0; b < blocks; ++b) {
            const uint16_t* from = w.scales + (piece * PIECE + b) * BLOCK / w.group;
            for (int64_t i = 0; i < TILE_OUTPUTS; ++i)
                scales[b * TILE_OUTPUTS + i] = from_bfloat16(from[row_of(n + i) * slab.groups]);
        }
        const int64_t block_bytes = SUM_BYTES / PIECE, stride = blocks * block_bytes;
        for (int64_t b = 0; b < blocks; ++b) {
            // Both sides of the next block come from the second cache while this one is unpacked.
            for (int64_t i = 0; i < TILE_OUTPUTS; ++i)
                for (int64_t line = 0; line < bytes; line += LINE) __builtin_prefetch(words[i] + (b + 1) * bytes + line);
            for (int i = 0; i < SUMS; ++i)
                for (int64_t line = 0; line < block_bytes; line += LINE)
                    __builtin_prefetch(unpacked.data() + i * stride + (b + 1) * block_bytes + line, 1);
            unpack<BITS, BLOCK>(words, b * bytes, unpacked.data() + b * block_bytes, stride);
        }
    }

    void multiply_tile(int64_t piece, int64_t n, int64_t tile) {
        const int64_t start = slab.start(tile), rows = slab.start(tile + 1) - start, blocks = slab.piece_blocks(piece);
        const TileScales of = {scales.data(), slab.steps.data() + piece * PIECE * slab.rows + start, slab.rows,
                               products.data()};
        const uint32_t* x = slab.x.data() + slab.place(piece, tile);
        float* to = sums.data() + (n / TILE_OUTPUTS * slab.tiles + tile) * TILE_SUMS;
        dot_rows<TILE_ROWS>(rows, x, of, blocks, piece == 0, to);
    }

    template <int ROWS>
    void dot_rows(int64_t rows, const uint32_t* x, const TileScales& of, int64_t blocks, bool fresh, float* to) const {
        if constexpr (ROWS > 1)
            if (rows < ROWS) return dot_rows<ROWS - 1>(rows, x, of, blocks, fresh, to);
        const uint8_t* words = unpacked.data();
        dot_sum<BLOCK, ROWS, true>(words, x, of, blocks, fresh, to);
        for (int i = 1; i < SUMS; ++i) {
            words += blocks * (SUM_BYTES / PIECE);
            x += blocks * ROWS * WORDS;
            to += TILE_OUTPUTS;
            dot_sum<BLOCK, ROWS, false>(words, x, of, blocks, fresh, to);
        }
    }

    // A part of the weights that are unpacked next: of the next piece, or of the first of what follows.
    void prefetch(int64_t piece, int64_t n, int64_t tile) const {
        const bool last = (piece + 1) * PIECE >= slab.blocks;
        const int64_t next = last ? 0 : piece + 1, bytes = slab.piece_blocks(next) * BLOCK * BITS / 8;
        const int64_t lines = parts(bytes, LINE), each = parts(TILE_OUTPUTS * lines, slab.tiles);
        for (int64_t i = tile * each; i < least((tile + 1) * each, TILE_OUTPUTS * lines); ++i) {
            const int64_t row = row_of(n + i / lines) + (last ? width(p) : 0);
            const uint8_t* words = w.words + (row * slab.blocks + next * PIECE) * (BLOCK * BITS / 8);
            __builtin_prefetch(words + i % lines * LINE, 0, 2);
        }
    }

    // Where finish_tile writes.
    void prefetch_outputs(int64_t tile, int64_t n) const {
        const int64_t column = first + (p.swiglu ? 0 : n);
        for (int64_t m = slab.start(tile); m < slab.start(tile + 1) && column < outputs; ++m) {
            const int64_t at = ((slab.first + m) * outputs + column) * size_of(p.type);
            __builtin_prefetch(static_cast<char*>(p.y) + at, 1);
            if (p.residual) __builtin_prefetch(static_cast<const char*>(p.residual) + at);
        }
    }

    // Of what is multiplied next.
    void prefetch_scales() const {
        for (int64_t i = 0; i < TILE_WEIGHTS; ++i) {
            const int64_t at = (row_of(i) + width(p)) * slab.groups;
            for (int64_t g = 0; g < slab.groups; g += LINE / 2) {
                __builtin_prefetch(w.scales + at + g, 0, 2);
                if (w.zeros) __builtin_prefetch(w.zeros + at + g, 0, 2);
            }
        }
    }

    void weigh_zeros() {
        const float offset = float(1 << (BITS - 1));
        for (int64_t i = 0; i < TILE_WEIGHTS; ++i) {
            const int64_t at = row_of(i) * slab.groups;
            for (int64_t g = 0; g < slab.groups; ++g) {
                const float zero = w.zeros ? from_float16(w.zeros[at + g]) : 0;
                weighed[g * TILE_WEIGHTS + i] = from_bfloat16(w.scales[at + g]) * (offset + zero);
            }
            biases[i] = p.bias ? read(p.bias, p.type, row_of(i)) : 0;
        }
    }

    // `sum` of eight in each lane.
    static Lanes sum_lanes(const Lanes (&a)[SUMS]) {
        return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
    }

    // y[r][i ...]: rows m + r of x with LANES rows of the tile of weights from i on, and the bias.
    template <int R>
    void products_with(int64_t tile, int64_t m, int64_t i, float (&y)[R][TILE_WEIGHTS]) const {
        const float* from = sums.data() + (i / TILE_OUTPUTS * slab.tiles + tile) * TILE_SUMS +
                            (m - slab.start(tile)) * SUMS * TILE_OUTPUTS + i % TILE_OUTPUTS;
        const float *zeros = weighed.data() + i, *totals = slab.totals.data() + m * slab.groups;
        Lanes terms[R][SUMS];
        for (int r = 0; r < R; ++r)
            for (int s = 0; s < SUMS; ++s) terms[r][s] = splat_lanes(0.0f);
        int64_t g = 0;
        for (; g + SUMS <= slab.groups; g += SUMS)
            for (int s = 0; s < SUMS; ++s) {
                const Lanes zero = load_lanes(zeros + (g + s) * TILE_WEIGHTS);
                for (int r = 0; r < R; ++r)
                    terms[r][s] = fma(zero, splat_lanes(totals[r * slab.groups + g + s]), terms[r][s]);
            }
        for (int r = 0; r < R; ++r) {
            const Lanes subtracted = sum_lanes(terms[r]);
            for (int s = 0; s < SUMS; ++s) terms[r][s] = load_lanes(from + (r * SUMS + s) * TILE_OUTPUTS);
            Lanes value = sum_lanes(terms[r]) + load_lanes(biases.data() + i) - subtracted;
            for (int64_t rest = g; rest < slab.groups; ++rest)
                value = value - load_lanes(zeros + rest * TILE_WEIGHTS) * splat_lanes(totals[r * slab.groups + rest]);
            store_lanes(y[r] + i, value);
        }
    }

    void finish_tile(int64_t tile, int64_t from, int64_t to) const {
        int64_t m = slab.start(tile), end = slab.start(tile + 1);
        for (; m + 2 <= end; m += 2) finish<2>(tile, m, from, to);
        if (m < end) finish<1>(tile, m, from, to);
    }

    // Writes what R rows of x from m on have with rows from ... to - 1 of the tile of weights.
    template <int R>
    void finish(int64_t tile, int64_t m, int64_t from, int64_t to) const {
        float y[R][TILE_WEIGHTS];
        for (int64_t i = from; i < to; i += LANES) products_with<R>(tile, m, i, y);
        const int64_t start = first + from, count = least(p.swiglu ? TILE_OUTPUTS : to - from, outputs - start);
        for (int r = 0; r < R; ++r) {
            float* values = y[r] + from;
            if (p.swiglu)
                for (int64_t i = 0; i < TILE_OUTPUTS; ++i)
                    values[i] = values[i] / (1 + std::exp(-values[i])) * values[TILE_OUTPUTS + i];
            const int64_t at = (slab.first + m + r) * outputs + start;
            if (p.type == Type::float32) {
                float* to = static_cast<float*>(p.y) + at;
                const float* added = p.residual ? static_cast<const float*>(p.residual) + at : nullptr;
                for (int64_t i = 0; i < count; ++i) to[i] = added ? values[i] + added[i] : values[i];
            } else {
                for (int64_t i = 0; i < count; ++i)
                    write(p.y, p.type, at + i, p.residual ? values[i] + read(p.residual, p.type, at + i) : values[i]);
            }
        }
    }
};

template <int BITS, int BLOCK>
void run(const QuantizedMatmul& p) {
    for (int64_t first = 0; first < p.M; first += SLAB) {
        const Slab<BITS, BLOCK> slab(p, first, least(SLAB, p.M - first));
        const int64_t outputs = p.swiglu ? p.weight.rows / 2 : p.weight.rows;
        const int64_t width = Weights<BITS, BLOCK>::width(p), tiles = parts(outputs, width);
#pragma omp parallel if (p.weight.rows * p.weight.columns * BITS / 8 * least(p.M, 8) > SHARED)
        {
            Weights<BITS, BLOCK> weights(slab);
#pragma omp for schedule(dynamic, 4)
            for (int64_t tile = 0; tile < tiles; ++tile) weights.multiply(tile * width);
        }
    }
}

}  // namespace

bool multiply_by_tiles(const QuantizedMatmul& p) {
    if (p.M < (p.weight.bits == 4 ? LEAST_ROWS_4_BITS : LEAST_ROWS_8_BITS)) return false;
    const int block = p.weight.block;
    if (p.weight.bits == 4) block == 128 ? run<4, 128>(p) : run<4, 64>(p);
    else if (block == 128) run<8, 128>(p);
    else block == 64 ? run<8, 64>(p) : run<8, 32>(p);
    return true;
}

#else

bool multiply_by_tiles(const QuantizedMatmul&) { return false; }

#endif

}  // namespace mimo_fast::MIMO_FAST_SET
