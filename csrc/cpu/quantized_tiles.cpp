// y = x W^T + b for many rows of x, by the arithmetic of integers: W is unpacked once for up to SLAB rows.
//
// x is converted once, by tiles of TILE_ROWS rows whose blocks are interleaved as registers read them, in pieces of
// TILE_COLUMNS columns. A thread takes TILE_OUTPUTS rows of W, unpacks TILE_COLUMNS of them, which stay in its first
// cache, and multiplies every tile of x by them. Sums wait in the second cache until the last column. What is fetched
// from there is, an instruction that multiplies, two bytes. The next weights are prefetched meanwhile.

#include "quantized_tiles.h"

#include "buffer.h"
#include "fixed_point.h"
#include "quantized_finish.h"
#include "tile_dot.h"

namespace mimo_fast::MIMO_FAST_SET {

#if defined(MIMO_FAST_AVX2) || defined(MIMO_FAST_AVX512)

namespace {

constexpr int64_t SLAB = 256;      // rows of x at a time: their sums stay in a second cache of 512 KB
constexpr int64_t LEAST_ROWS = 6;  // fewer are as fast row by row
constexpr int64_t LINE = 64;       // bytes of a cache's line

int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Some rows of x in fixed point.
template <int BITS, int BLOCK>
struct Slab {
    static constexpr int64_t PIECE = TILE_COLUMNS / BLOCK;            // blocks
    static constexpr int64_t WORDS = X_WORDS * BLOCK / WORD_VALUES;  // of a row and a block

    const QuantizedMatmul& p;
    const int64_t first, rows, tiles, blocks, groups;
    Aligned<uint32_t> x;       // [pieces, tiles, blocks of a piece, rows of a tile, WORDS]
    Aligned<float> steps;      // [blocks, rows]: s
    Aligned<int32_t> offsets;  // [blocks, rows]: what offset and x have in the sum of a block
    Aligned<float> totals;     // [blocks, rows]: sum of x

    Slab(const QuantizedMatmul& p, int64_t first, int64_t rows)
        : p(p), first(first), rows(rows), tiles(parts(rows, TILE_ROWS)), blocks(p.weight.columns / BLOCK),
          groups(p.weight.columns / p.weight.group), x(rows * blocks * WORDS), steps(blocks * rows),
          offsets(blocks * rows), totals(blocks * rows) {
#pragma omp parallel for schedule(dynamic)
        for (int64_t tile = 0; tile < tiles; ++tile)
            for (int64_t m = start(tile); m < start(tile + 1); ++m) convert(tile, m);
    }

    // The first row of a tile: rows are shared evenly, so that none is left with few.
    int64_t start(int64_t tile) const { return tile * rows / tiles; }
    int64_t piece_blocks(int64_t piece) const { return least(PIECE, blocks - piece * PIECE); }

    // Where the words of a tile begin.
    int64_t place(int64_t piece, int64_t tile) const {
        return WORDS * (piece * PIECE * rows + start(tile) * piece_blocks(piece));
    }

    void convert(int64_t tile, int64_t m) {
        const int64_t rows_here = start(tile + 1) - start(tile), row = m - start(tile);
        fix_row(p, first + m, [&](int64_t b, const FixedBlock& block) {
            const int64_t piece = b / PIECE, within = b % PIECE;
            pack_x<BITS, BLOCK>(block.values, x.data() + place(piece, tile) + (within * rows_here + row) * WORDS);
            steps[b * rows + m] = block.step;
            offsets[b * rows + m] = -(1 << (BITS - 1)) * block.total;
            totals[b * rows + m] = float(block.total);
        });
    }
};

// TILE_OUTPUTS rows of W with a slab.
template <int BITS, int BLOCK>
class Weights {
  public:
    explicit Weights(const Slab<BITS, BLOCK>& slab)
        : slab(slab), p(slab.p), w(slab.p.weight), outputs(p.swiglu ? w.rows / 2 : w.rows),
          scales(slab.blocks * TILE_OUTPUTS), zeros(w.zeros ? slab.blocks * TILE_OUTPUTS : 0), biases(TILE_OUTPUTS),
          unpacked(PIECE * BLOCK_BYTES), sums(slab.tiles * TILE_SUMS) {}

    // Outputs that a tile has: with SwiGLU half of its rows are of gate, half of up.
    static int64_t width(const QuantizedMatmul& p) { return p.swiglu ? TILE_OUTPUTS / 2 : TILE_OUTPUTS; }

    void multiply(int64_t first_output) {
        first = first_output;
        // With fewer rows than a tile has the last one again, whose result nobody reads.
        for (int64_t i = 0, half = width(p); i < half; ++i)
            for (int64_t from = 0; from < TILE_OUTPUTS; from += half)
                rows[from + i] = from / half * outputs + least(first + i, outputs - 1);
        read_vectors();
        for (int64_t piece = 0; piece * PIECE < slab.blocks; ++piece) {
            const bool last = (piece + 1) * PIECE >= slab.blocks;
            unpack_piece(piece);
            for (int64_t tile = 0; tile < slab.tiles; ++tile) {
                prefetch(piece, tile);
                if (last) prefetch_outputs(tile);
                multiply_tile(piece, tile);
                // Sums are still in the first cache.
                if (last) finish_tile(tile);
            }
        }
    }

  private:
    static constexpr int64_t PIECE = Slab<BITS, BLOCK>::PIECE;
    static constexpr int64_t BLOCK_BYTES = BLOCK / WORD_VALUES * TILE_OUTPUTS * 4;
    static constexpr int64_t TILE_SUMS = SUMS * TILE_ROWS * TILE_OUTPUTS;

    const Slab<BITS, BLOCK>& slab;
    const QuantizedMatmul& p;
    const QuantizedWeight& w;
    const int64_t outputs;
    int64_t first = 0;
    int64_t rows[TILE_OUTPUTS];  // of W, the tile's
    Aligned<float> scales;      // [blocks, TILE_OUTPUTS]
    Aligned<float> zeros;       // [blocks, TILE_OUTPUTS], where W has zeros
    Aligned<float> biases;      // [TILE_OUTPUTS]
    Aligned<uint8_t> unpacked;  // [blocks of a piece, see unpack]
    Aligned<float> sums;        // [tiles, SUMS, TILE_ROWS, TILE_OUTPUTS]

    // values [rows of W, groups] of the tile, widened, to [blocks, TILE_OUTPUTS].
    template <class Widen>
    void read_groups(const uint16_t* values, Widen widen, float* to) const {
        const int64_t blocks_of_group = w.group / BLOCK;
        for (int64_t g = 0; g < slab.groups; g += 8) {
            const int64_t count = least(8, slab.groups - g);
            float eight[TILE_OUTPUTS][8];
            for (int64_t i = 0; i < TILE_OUTPUTS; ++i) {
                const uint16_t* from = values + rows[i] * slab.groups + g;
                uint16_t few[8] = {};
                for (int64_t j = 0; j < count && count < 8; ++j) few[j] = from[j];
                store(eight[i], widen(count < 8 ? few : from));
            }
            transpose_rows(eight, [&](int64_t j, int64_t n, Words group) {
                for (int64_t b = 0; b < blocks_of_group && j < count; ++b)
                    store_words(to + ((g + j) * blocks_of_group + b) * TILE_OUTPUTS + n, group);
            });
        }
    }

    // What a tile has beside its words.
    void read_vectors() {
        for (int64_t i = 0; i < TILE_OUTPUTS; ++i) biases[i] = p.bias ? read(p.bias, p.type, rows[i]) : 0;
        read_groups(w.scales, [](const uint16_t* values) { return load_bfloat16(values); }, scales.data());
        if (w.zeros) read_groups(w.zeros, [](const uint16_t* values) { return load_float16(values); }, zeros.data());
        prefetch_scales();
    }

    void unpack_piece(int64_t piece) {
        const int64_t blocks = slab.piece_blocks(piece), bytes = BLOCK * BITS / 8, at = piece * PIECE;
        const uint8_t* words[TILE_OUTPUTS];
        for (int64_t i = 0; i < TILE_OUTPUTS; ++i) words[i] = w.words + (rows[i] * slab.blocks + at) * bytes;
        unpack<BITS>(words, blocks * bytes, unpacked.data());
    }

    void multiply_tile(int64_t piece, int64_t tile) {
        const int64_t start = slab.start(tile), rows = slab.start(tile + 1) - start, at = piece * PIECE;
        const int64_t outputs = at * TILE_OUTPUTS, values = at * slab.rows + start;
        const TileScales of = {scales.data() + outputs, slab.steps.data() + values, slab.offsets.data() + values,
                               slab.rows, zeros.data() + outputs, slab.totals.data() + values};
        float* to = sums.data() + tile * TILE_SUMS;
        if (piece == 0) std::memset(to, 0, TILE_SUMS * sizeof(float));
        const uint32_t* x = slab.x.data() + slab.place(piece, tile);
        if (w.zeros) dot_rows<true, TILE_ROWS>(rows, x, of, at, slab.piece_blocks(piece), to);
        else dot_rows<false, TILE_ROWS>(rows, x, of, at, slab.piece_blocks(piece), to);
    }

    template <bool ZEROS, int ROWS>
    void dot_rows(int64_t rows, const uint32_t* x, const TileScales& of, int64_t at, int64_t blocks, float* to) const {
        if constexpr (ROWS > 1)
            if (rows < ROWS) return dot_rows<ZEROS, ROWS - 1>(rows, x, of, at, blocks, to);
        dot_tile<BLOCK, ZEROS, ROWS>(unpacked.data(), x, of, at, blocks, to);
    }

    // A part of the weights that are unpacked next: of the next piece, or of the first of what follows.
    void prefetch(int64_t piece, int64_t tile) const {
        const bool last = (piece + 1) * PIECE >= slab.blocks;
        const int64_t next = last ? 0 : piece + 1, bytes = slab.piece_blocks(next) * BLOCK * BITS / 8;
        const int64_t to = (tile + 1) * TILE_OUTPUTS / slab.tiles;
        for (int64_t i = tile * TILE_OUTPUTS / slab.tiles; i < to; ++i) {
            const int64_t row = rows[i] + (last ? width(p) : 0);
            const uint8_t* words = w.words + (row * slab.blocks + next * PIECE) * (BLOCK * BITS / 8);
            for (int64_t line = 0; line < bytes; line += LINE) fetch(words + line);
        }
    }

    // Where finish_tile writes.
    void prefetch_outputs(int64_t tile) const {
        for (int64_t m = slab.start(tile); m < slab.start(tile + 1); ++m)
            for (int64_t i = 0; i < width(p); i += LINE / 4) {
                const int64_t at = ((slab.first + m) * outputs + first + i) * size_of(p.type);
                fetch(static_cast<char*>(p.y) + at);
                if (p.residual) fetch(static_cast<const char*>(p.residual) + at);
            }
    }

    // Of what is multiplied next.
    void prefetch_scales() const {
        for (int64_t i = 0; i < TILE_OUTPUTS; ++i) {
            const int64_t at = (rows[i] + width(p)) * slab.groups;
            for (int64_t g = 0; g < slab.groups; g += LINE / 2) {
                fetch(w.scales + at + g);
                if (w.zeros) fetch(w.zeros + at + g);
            }
        }
    }

    // `sum` of eight in each lane.
    static Lanes sum_lanes(const Lanes (&a)[SUMS]) {
        return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
    }

    // Writes what the rows of a tile of x have with the tile of weights.
    void finish_tile(int64_t tile) const {
        const int64_t start = slab.start(tile), count = least(width(p), outputs - first);
        const float* from = sums.data() + tile * TILE_SUMS;
        for (int64_t m = start; m < slab.start(tile + 1); ++m, from += TILE_OUTPUTS) {
            alignas(64) float y[TILE_OUTPUTS];
            for (int64_t i = 0; i < TILE_OUTPUTS; i += LANES) {
                Lanes terms[SUMS];
                for (int s = 0; s < SUMS; ++s) terms[s] = load_lanes(from + s * TILE_ROWS * TILE_OUTPUTS + i);
                store_lanes(y + i, sum_lanes(terms) + load_lanes(biases.data() + i));
            }
            finish_row(p, slab.first + m, first, count, y, y + width(p));
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
    if (p.M < LEAST_ROWS) return false;
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
