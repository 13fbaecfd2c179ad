// Products of few rows with int4 or int8 weights on tensor cores; bfloat16 or float16 in and out, sums in float32.
//
//   y [M, N] = epilogues(norm(x) W^T + b)          formulas: mimo_fast/kernels/qmatmul.py
//                                                  layout of W: mimo_fast/kernels/quantized_weight.py
//
// Such a product is bound by the bytes of W as long as they are asked for early enough and little is done for each. W is
// the operand with 16 rows (A), x the one with 8 columns (B): up to 8 rows of x cost what one does. What a product sums
// over may be in any order, if only A and B agree, so a thread multiplies the very words that it loaded.
//
//   unit: ROWS rows of W x 128 columns      what a warp asks for, and multiplies, at once
//     int4, 16 words a row                    thread t of the four that share row g: words 4 t ... 4 t + 3, 16 bytes
//       word i, bits 4 v and 4 v + 16         columns 16 v + 4 t + i and 64 more, v = 0 ... 3
//     int8, 32 words a row                    words 4 t ... and 16 + 4 t ..., 16 bytes each
//       word i of part v / 2, bits 8 (v % 2)  columns 32 (v % 2) + 16 (v / 2) + 4 t + i and 64 more
//   pair (i, v): these two columns as the halves of a register; four registers are A, two are B of one instruction
//
// Unpacking a pair (q is stored with an offset, o = 8 or 128):
//   bfloat16, int4   (w & 000f000f) | 43004300         128 + q; 128 + 8 leaves again with the sum of x, see below
//   bfloat16, int8   (w & 007f007f) | 43004300         128 + the low 7 bits, plus
//                    (~w & 00800080) | c300c300        -128 or -256: exactly q - 128
//   float16          (w & mask) | 64006400, plus a constant: exactly q - o
//
// A block of threads keeps its rows of x in shared memory, times the norm's weight and in the order of pairs, and goes
// through every gridDim.y-th tile of ROWS rows of W. Warp w has the units of columns w, w + WARPS, ... of each tile. Each
// thread's words come through a queue of STAGES units in shared memory, which runs on from tile to tile; it reads only
// what it asked for itself, so the queue needs no barrier. After a tile the warps' sums are added in order, and the norm's
// row scale, bias, SwiGLU and residual follow.
//
//   bytes read     W once for each chunk of rows of x, x once for each block of threads
//   order of sums  pairs of a unit in two alternating chains, units of a warp, warps: given by K alone. Neither the rows
//                  that come with a row nor ROWS, STAGES or the grid change it, so a row is the same bit for bit.
//   rounding       x times the norm's weight to T once; all else in float32; y to T once. There are no atomics.
//
// Weights (words, scales, zeros, norm, bias) are read before `pdl_wait`, that is while the kernel before this one may
// still run: none of them may be written by it (quantized_weight.py says what whoever makes a weight has to do).

#include <cstdlib>
#include <type_traits>

#include <warp.cuh>

namespace {

constexpr int COLUMNS = 128;
constexpr int PAIRS = 4;  // v

struct Product {
    const uint16_t* x;
    const uint16_t* norm;
    const uint4* words;
    const uint16_t* scales;
    const uint16_t* zeros;
    const uint16_t* bias;
    const uint16_t* residual;
    uint16_t* y;
    int64_t stride;
    int m, n, k;
    int swiglu;
    float eps;
    int chunk;  // rows of x of a block of threads
    int tiles;  // of W
    int begin;  // when the next kernel may: 0 ahead of the wait, 1 after it, 2 ahead of the last results, 3 at the end
};

// ---- Unpacking

constexpr int AND_OR = 0xea;      // (a & b) | c
constexpr int NOT_AND_OR = 0xae;  // (~a & b) | c

// Two q of a word, at bits `shift` and 16 more, as two T; what is to be taken from each of them by way of the sum of x is
// OFFSET.
template <class T, int BITS>
struct Unpack;

template <>
struct Unpack<Bfloat16, 4> {
    static constexpr float OFFSET = 128 + 8;
    __device__ static uint32_t pair(uint32_t word, int shift) {
        return lop3<AND_OR>(word >> shift, 0x000f000f, 0x43004300);
    }
};

template <>
struct Unpack<Bfloat16, 8> {
    static constexpr float OFFSET = 0;
    __device__ static uint32_t pair(uint32_t word, int shift) {
        const uint32_t low = lop3<AND_OR>(word >> shift, 0x007f007f, 0x43004300);
        return add_pairs<Bfloat16>(low, lop3<NOT_AND_OR>(word >> shift, 0x00800080, 0xc300c300));
    }
};

template <>
struct Unpack<Float16, 4> {
    static constexpr float OFFSET = 0;
    __device__ static uint32_t pair(uint32_t word, int shift) {  // 1024 + q, minus 1032
        return add_pairs<Float16>(lop3<AND_OR>(word >> shift, 0x000f000f, 0x64006400), 0xe408e408);
    }
};

template <>
struct Unpack<Float16, 8> {
    static constexpr float OFFSET = 0;
    __device__ static uint32_t pair(uint32_t word, int shift) {  // 1024 + q, minus 1152
        return add_pairs<Float16>(lop3<AND_OR>(word >> shift, 0x00ff00ff, 0x64006400), 0xe480e480);
    }
};

__device__ inline uint32_t word(const uint4& words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// ---- Configurations

// T, BITS: of x and what goes with it; of a value of W. GROUPED: W has a scale for each 128 columns, else for each row.
// ROWS: of W a tile; 8 leave half of A zero, which costs the tensor cores twice the time and nothing else: more blocks.
// WARPS: that share the columns of a tile. It decides about the order of sums, so it may follow from K alone.
// STAGES: units of a warp that are on their way. H100: 21 KB a multiprocessor hide the latency of its memory (0.9 us at
//     3.1 TB/s over 132 of them); a stage of 16 warps is 16 KB of int4 or 32 KB of int8 at 16 rows.
// TILES_X: of 8 rows of x, for each of which a unit's unpacked words are used again.
template <class T_, int BITS_, bool GROUPED_, int ROWS_, int WARPS_, int STAGES_, int TILES_X_>
struct Config {
    using T = T_;
    static constexpr bool GROUPED = GROUPED_;
    static constexpr int BITS = BITS_, ROWS = ROWS_, WARPS = WARPS_, STAGES = STAGES_, TILES_X = TILES_X_;
    static constexpr int THREADS = WARPS * 32;
    static constexpr int XS = 8 * TILES_X;
    static constexpr int HALVES = ROWS / 8;       // rows of W a thread has in a unit: g and, of 16, g + 8
    static constexpr int PARTS = BITS / 4;        // pieces of 16 bytes it has of each
    static constexpr int BUFFERS = TILES_X == 1 ? 2 : 1;  // of the warps' sums; one takes another barrier
    static constexpr bool SUM_X = BITS == 4;      // int8 has neither zeros nor an offset
    // Threads a multiprocessor has registers for. 1024 have 64 each, which lets the next kernel begin beside this one; what
    // does not fit into those on every GPU has 128.
    static constexpr bool SMALL = TILES_X == 1 && HALVES * PARTS < 4 && (BITS == 4 || !GROUPED);
    // No card of sm_120 has the shared memory for which `choose` takes 16 rows, and its compiler needs some more for those.
    static constexpr bool FITS = SMALL && (HALVES == 1 || ARCHITECTURE < 1200);
    static constexpr int RESIDENT = ARCHITECTURE >= 900 && FITS ? 1024 : 512;

    static_assert(BITS == 8 || (BITS == 4 && GROUPED));
    static_assert(ROWS == 8 || ROWS == 16, "the rows of A");
    static_assert(STAGES >= 2 && TILES_X >= 1);
    static_assert(XS * ROWS <= THREADS, "a thread writes one result of a tile");
    static_assert(THREADS <= 1024);
};

// Where things lie in a block's shared memory, as bytes from its begin.
template <class C>
struct Layout {
    int x, sums, squares, scales_x, sums_x, scales, total;

    __host__ __device__ Layout(const Product& p) {
        const int blocks = p.k / COLUMNS;
        int end = C::WARPS * C::STAGES * C::HALVES * C::PARTS * 32 * 16;  // the queues come first
        const auto take = [&end](int bytes) {
            const int begin = end;
            end += (bytes + 15) / 16 * 16;
            return begin;
        };
        x = take(p.chunk * p.k * 2);                                      // [blocks, i, chunk, t, v] pairs
        sums = take(C::BUFFERS * C::WARPS * C::XS * (C::ROWS + 1) * 4);   // [buffer, warp, row of x, row of W]
        squares = take(p.norm ? blocks * C::XS * 4 : 0);                  // [blocks, row of x]
        scales_x = take(p.norm ? C::XS * 4 : 0);                          // of the norm
        sums_x = take(C::SUM_X ? blocks * C::XS * 4 : 0);                 // [blocks, row of x]
        scales = take(C::GROUPED ? 2 * C::ROWS * blocks * 4 : 0);          // [tile % 2, block, row of W]: scale, zero
        total = end;
    }
};

// Row r of a tile as a row of W, at most the last: half of them gate and half up where a result takes one of each.
template <class C>
__device__ inline int weight_row(const Product& p, int tile, int r) {
    const int half = C::ROWS / 2;
    const int row = p.swiglu ? r / half * (p.n / 2) + tile * half + r % half : tile * C::ROWS + r;
    return row < p.n ? row : p.n - 1;
}

// ---- The queue of words

// The units of a warp, in order: of its first tile, of its next tile, ...
template <class C>
struct Units {
    int tile, block;
    const uint4* at;
    int to_lower;  // from row g to row g + 8

    __device__ Units(const Product& p, int warp, int lane) : tile(blockIdx.y), block(warp) {
        if (block >= p.k / COLUMNS) tile = p.tiles;
        find(p, lane);
    }

    __device__ void find(const Product& p, int lane) {
        const int step = p.k / COLUMNS * C::BITS, upper = weight_row<C>(p, tile, lane / 4);
        at = p.words + int64_t(upper) * step + block * C::BITS + lane % 4;
        if (C::HALVES == 2) to_lower = (weight_row<C>(p, tile, 8 + lane / 4) - upper) * step;
    }

    // Asks for the words of this unit, if there is one, and goes on to the next.
    __device__ void request(const Product& p, int warp, int lane, uint4* stage) {
        if (tile < p.tiles) {
            // Each chunk of rows of x reads all of W: of several, the first leaves it in L2 for the others.
            const uint64_t policy = gridDim.x == 1 ? policy_evict_first() : policy_evict_normal();
#pragma unroll
            for (int part = 0; part < C::PARTS; ++part) {
                cp_async(stage + part * 32 + lane, at + 4 * part, policy);
                if (C::HALVES == 2) cp_async(stage + (C::PARTS + part) * 32 + lane, at + to_lower + 4 * part, policy);
            }
            block += C::WARPS;
            at += C::WARPS * C::BITS;
            if (block >= p.k / COLUMNS) {
                block = warp;
                tile += gridDim.y;
                find(p, lane);
            }
        }
        cp_async_commit_group();
    }
};

// ---- Scales of a tile

// Four neighbouring scales and zeros of a tile's [ROWS, blocks], between their load and their store.
template <class C>
struct Scales {
    uint2 scale = {}, zero = {};

    __device__ void load(const Product& p, int tile, int piece) {
        const int blocks = p.k / COLUMNS, half = C::ROWS / 2 * blocks;
        int64_t place = 4 * piece;
        if (tile >= p.tiles || place >= 2 * half) return;
        if (!p.swiglu)
            place += int64_t(tile) * 2 * half;
        else
            place += int64_t(tile) * half + (place < half ? 0 : int64_t(p.n / 2) * blocks - half);
        const int64_t last = int64_t(p.n) * blocks - 1;
        scale = four(p.scales, place, last);
        if (C::BITS == 4) zero = p.zeros ? four(p.zeros, place, last) : make_uint2(0, 0);
    }

    __device__ static uint2 four(const uint16_t* from, int64_t place, int64_t last) {
        if (reinterpret_cast<uintptr_t>(from + place) % 8 == 0 && place + 3 <= last)
            return *reinterpret_cast<const uint2*>(from + place);
        const auto one = [&](int i) { return uint32_t(from[place + i < last ? place + i : last]); };
        return make_uint2(one(1) << 16 | one(0), one(3) << 16 | one(2));
    }

    // As [block, row], a scale in the lower half of a word and a zero in the upper one.
    __device__ void store(const Product& p, uint32_t* to, int piece) const {
        const int blocks = p.k / COLUMNS;
        if (4 * piece >= C::ROWS * blocks) return;
        int row = 4 * piece / blocks, block = 4 * piece % blocks;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t low = i < 2 ? scale.x : scale.y, high = C::BITS == 8 ? 0 : i < 2 ? zero.x : zero.y;
            to[block * C::ROWS + row] = prmt(low, high, i % 2 ? 0x7632 : 0x5410);
            if (++block == blocks) block = 0, ++row;
        }
    }
};

// ---- x

// A thread's part of a row's block of columns: columns i and 64 more for i of four, from `column` on.
template <class C>
struct Eight {
    using T = typename C::T;
    uint2 low, high;

    __device__ static Eight load(const uint16_t* from, bool real) {
        const auto quad = [&](int at) { return real ? *reinterpret_cast<const uint2*>(from + at) : make_uint2(0, 0); };
        return {quad(0), quad(64)};
    }

    template <class Operation>
    __device__ static float over(const uint2& quad, Operation of) {
        return (of(widen<T>(uint16_t(quad.x))) + of(widen<T>(uint16_t(quad.x >> 16)))) +
               (of(widen<T>(uint16_t(quad.y))) + of(widen<T>(uint16_t(quad.y >> 16))));
    }

    // Over the 16 threads of a row's block.
    template <class Operation>
    __device__ float sum(Operation of) const {
        float sum = over(low, of) + over(high, of);
#pragma unroll
        for (int lanes = 1; lanes < 16; lanes *= 2) sum += shfl_xor(sum, lanes);
        return sum;
    }

    __device__ void multiply(const Eight& by) {
        low = make_uint2(mul_pairs<T>(low.x, by.low.x), mul_pairs<T>(low.y, by.low.y));
        high = make_uint2(mul_pairs<T>(high.x, by.high.x), mul_pairs<T>(high.y, by.high.y));
    }

    __device__ void store(uint32_t* to, int step) const {
        to[0] = prmt(low.x, high.x, 0x5410);
        to[step] = prmt(low.x, high.x, 0x7632);
        to[2 * step] = prmt(low.y, high.y, 0x5410);
        to[3 * step] = prmt(low.y, high.y, 0x7632);
    }
};

// Rows first, ... first + rows - 1 of x, times the norm's weight, in the order of pairs; and for each row and block of
// columns the sum of these and the sum of the squares of x. 16 threads have a row's block, whatever rows there are, so
// the order of these sums is always the same.
template <class C>
__device__ void stage_x(const Product& p, const Layout<C>& layout, unsigned char* shared, int first, int rows) {
    constexpr int AT_ONCE = 4;  // loads of a thread that are on their way together
    uint32_t* const pairs = reinterpret_cast<uint32_t*>(shared + layout.x);
    float* const sums = reinterpret_cast<float*>(shared + layout.sums_x);
    float* const squares = reinterpret_cast<float*>(shared + layout.squares);
    const int blocks = p.k / COLUMNS, t = threadIdx.x % 4, v = threadIdx.x / 4 % 4;
    const int offset = (C::BITS == 4 ? 16 * v : 32 * (v % 2) + 16 * (v / 2)) + 4 * t;
    // Groups of 16 threads, each with another block; several rows at once where there are more groups than blocks. All
    // lanes of a warp go through the loops alike, for they shuffle.
    constexpr int GROUPS = C::THREADS / 16;
    const int rows_at_once = blocks < GROUPS ? GROUPS / blocks : 1, group = threadIdx.x / 16;
    const int own_row = blocks < GROUPS ? group / blocks : 0, own_block = blocks < GROUPS ? group % blocks : group;
    for (int begin = 0; begin < blocks; begin += GROUPS) {
        const int block = begin + own_block, column = block * COLUMNS + offset;
        const bool mine = block < blocks && own_row < rows_at_once;
        Eight<C> weight;
        if (p.norm) weight = Eight<C>::load(p.norm + column, mine);
        for (int from = 0; from < rows; from += AT_ONCE * rows_at_once) {
            Eight<C> x[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int row = from + i * rows_at_once + own_row;
                x[i] = Eight<C>::load(p.x + (first + row) * p.stride + column, mine && row < rows);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int row = from + i * rows_at_once + own_row;
                if (from + i * rows_at_once >= rows) break;
                const bool real = mine && row < rows, writes = real && threadIdx.x % 16 == 0;
                if (p.norm) {
                    const float square = x[i].sum([](float value) { return value * value; });
                    if (writes) squares[block * C::XS + row] = square;
                    x[i].multiply(weight);
                }
                if (C::SUM_X) {
                    const float sum = x[i].sum([](float value) { return value; });
                    if (writes) sums[block * C::XS + row] = sum;
                }
                if (real) x[i].store(pairs + (block * 4 * rows + row) * 16 + 4 * t + v, rows * 16);
            }
        }
    }
}

// The norm's scale of each row: 1 / sqrt(mean of squares + eps).
template <class C>
__device__ void scale_rows(const Product& p, const Layout<C>& layout, unsigned char* shared, int rows) {
    const float* const squares = reinterpret_cast<const float*>(shared + layout.squares);
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < rows; row += C::WARPS) {
        float sum = 0;
        for (int block = lane; block < p.k / COLUMNS; block += 32) sum += squares[block * C::XS + row];
#pragma unroll
        for (int lanes = 1; lanes < 32; lanes *= 2) sum += shfl_xor(sum, lanes);
        if (lane == 0) reinterpret_cast<float*>(shared + layout.scales_x)[row] = rsqrtf(sum / p.k + p.eps);
    }
}

// ---- One unit

// What a thread has of the sums of its warp: of rows g and g + 8 of W with rows 2 t and 2 t + 1 of each tile of x.
template <class C>
struct Sums {
    using T = typename C::T;
    float total[C::TILES_X][4] = {};

    __device__ void add(const uint4 (&words)[C::HALVES][C::PARTS], const uint4* x, const float* sums_x,
                        const uint32_t* scales, int rows) {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        float chain[C::TILES_X][2][4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t a[C::HALVES][PAIRS];
#pragma unroll
            for (int half = 0; half < C::HALVES; ++half)
#pragma unroll
                for (int v = 0; v < PAIRS; ++v)
                    a[half][v] = C::BITS == 4 ? Unpack<T, C::BITS>::pair(word(words[half][0], i), 4 * v)
                                              : Unpack<T, C::BITS>::pair(word(words[half][v / 2 % C::PARTS], i), v % 2 * 8);
#pragma unroll
            for (int tile = 0; tile < C::TILES_X; ++tile) {
                const int row = 8 * tile + g;
                const uint4 b = row < rows ? x[(i * rows + row) * 4 + t] : uint4{0, 0, 0, 0};
                // Rows g + 8 of A are zero where a tile has 8.
                const uint32_t* const lower = a[C::HALVES - 1];
                const uint32_t keep = C::HALVES == 2 ? 0xffffffff : 0;
                mma_m16n8k16<T>(chain[tile][0], a[0][0], lower[0] & keep, a[0][1], lower[1] & keep, b.x, b.y);
                mma_m16n8k16<T>(chain[tile][1], a[0][2], lower[2] & keep, a[0][3], lower[3] & keep, b.z, b.w);
            }
        }
#pragma unroll
        for (int half = 0; half < C::HALVES; ++half) {
            const uint32_t both = scales ? scales[half * 8 + g] : 0;
            const float scale = scales ? widen<T>(uint16_t(both)) : 1;
            const float offset = Unpack<T, C::BITS>::OFFSET + from_half(uint16_t(both >> 16));
#pragma unroll
            for (int tile = 0; tile < C::TILES_X; ++tile)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int i = half * 2 + j;
                    float sum = chain[tile][0][i] + chain[tile][1][i];
                    if (C::SUM_X) sum -= offset * sums_x[8 * tile + 2 * t + j];
                    total[tile][i] += scale * sum;
                }
        }
    }
};

// ---- What follows the sums

__device__ inline float silu(float value) { return value / (1 + expf(-value)); }

// One result of a tile, of one thread: what is read for it while the sums are not there yet. With SwiGLU it takes two rows
// of W, whose values are the halves of a word.
template <class C>
struct Result {
    using T = typename C::T;
    uint32_t bias = 0, scale = 0;
    uint16_t residual = 0;

    // Where a thread's result of a tile is: row x of the block's, row r of the tile's results, column of y.
    struct Place {
        int x, r, column, width;
        bool real;

        __device__ Place(const Product& p, int tile, int rows) {
            const int outputs = p.swiglu ? C::ROWS / 2 : C::ROWS;
            width = p.swiglu ? p.n / 2 : p.n;
            x = threadIdx.x / outputs, r = threadIdx.x % outputs, column = tile * outputs + r;
            real = x < rows && column < width && tile < p.tiles;
        }
    };

    __device__ void load_weight(const Product& p, int tile, int rows) {
        const Place at(p, tile, rows);
        if (!at.real) return;
        const auto load = [&](const uint16_t* from) {
            return p.swiglu ? uint32_t(from[at.column + at.width]) << 16 | from[at.column] : from[at.column];
        };
        if (p.bias) bias = load(p.bias);
        if (!C::GROUPED) scale = load(p.scales);
    }

    __device__ void load_residual(const Product& p, int tile, int first, int rows) {
        const Place at(p, tile, rows);
        if (at.real && p.residual) residual = p.residual[int64_t(first + at.x) * at.width + at.column];
    }

    __device__ void write(const Product& p, int tile, int first, int rows, const float* sums, const float* scales_x) const {
        const Place at(p, tile, rows);
        if (!at.real) return;
        const float norm = p.norm ? scales_x[at.x] : 1;
        const auto result = [&](int i) {
            const float* from = sums + at.x * (C::ROWS + 1) + at.r + i * (C::ROWS / 2);
            float sum = 0;
#pragma unroll
            for (int warp = 0; warp < C::WARPS; ++warp) sum += from[warp * C::XS * (C::ROWS + 1)];
            if (!C::GROUPED) sum *= widen<T>(uint16_t(scale >> 16 * i));
            return sum * norm + (p.bias ? widen<T>(uint16_t(bias >> 16 * i)) : 0);
        };
        float value = result(0);
        if (p.swiglu) value = silu(value) * result(1);
        if (p.residual) value += widen<T>(residual);
        p.y[int64_t(first + at.x) * at.width + at.column] = narrow<T>(value);
    }
};

// ---- The kernel

template <class C>
__global__ void __launch_bounds__(C::THREADS, C::RESIDENT / C::THREADS) quantized_mma(const Product p) {
    unsigned char* const shared = dynamic_shared();
    const Layout<C> layout(p);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = p.k / COLUMNS;
    const int first = blockIdx.x * p.chunk, rows = p.m - first < p.chunk ? p.m - first : p.chunk;
    const int thread = threadIdx.x, scales_size = C::ROWS * blocks;
    uint32_t* const all_scales = reinterpret_cast<uint32_t*>(shared + layout.scales);

    // The weights are asked for before the last kernel's results are there.
    constexpr int STAGE = C::HALVES * C::PARTS * 32;
    uint4* const queue = reinterpret_cast<uint4*>(shared) + warp * C::STAGES * STAGE;
    Units<C> ahead(p, warp, lane);
#pragma unroll 1
    for (int stage = 0; stage < C::STAGES; ++stage) ahead.request(p, warp, lane, queue + stage * STAGE);
    if (p.begin == 0) pdl_launch_dependents();
    if (p.norm && thread < p.k / 64) prefetch_l2(p.norm + thread * 64);
    Result<C> result;
    result.load_weight(p, blockIdx.y, rows);
    Scales<C> scales;
    if (C::GROUPED) {
        scales.load(p, blockIdx.y, thread);
        scales.store(p, all_scales, thread);
    }
    pdl_wait();
    if (p.begin == 1) pdl_launch_dependents();

    stage_x<C>(p, layout, shared, first, rows);
    __syncthreads();
    if (p.norm) scale_rows<C>(p, layout, shared, rows);

    int stage = 0, turn = 0;
    for (int tile = blockIdx.y; tile < p.tiles; tile += gridDim.y, turn ^= 1) {
        result.load_residual(p, tile, first, rows);
        if (C::GROUPED) scales.load(p, tile + gridDim.y, thread);
        Sums<C> mine;
        for (int block = warp; block < blocks; block += C::WARPS) {
            cp_async_wait_group<C::STAGES - 1>();
            uint4* const here = queue + stage * STAGE;
            uint4 words[C::HALVES][C::PARTS];
#pragma unroll
            for (int half = 0; half < C::HALVES; ++half)
#pragma unroll
                for (int part = 0; part < C::PARTS; ++part) words[half][part] = here[(half * C::PARTS + part) * 32 + lane];
            ahead.request(p, warp, lane, here);
            stage = stage + 1 == C::STAGES ? 0 : stage + 1;
            mine.add(words, reinterpret_cast<const uint4*>(shared + layout.x) + block * 16 * rows,
                     reinterpret_cast<const float*>(shared + layout.sums_x) + block * C::XS,
                     C::GROUPED ? all_scales + turn * scales_size + block * C::ROWS : nullptr, rows);
        }
        if (C::GROUPED && tile + int(gridDim.y) < p.tiles)
            scales.store(p, all_scales + (turn ^ 1) * scales_size, thread);

        float* const sums = reinterpret_cast<float*>(shared + layout.sums) +
                            (C::BUFFERS == 2 ? turn : 0) * C::WARPS * C::XS * (C::ROWS + 1);
        if (C::BUFFERS == 1) __syncthreads();
#pragma unroll
        for (int x = 0; x < C::TILES_X; ++x)
#pragma unroll
            for (int i = 0; i < 2 * C::HALVES; ++i)
                sums[(warp * C::XS + 8 * x + 2 * (lane % 4) + i % 2) * (C::ROWS + 1) + i / 2 * 8 + lane / 4] =
                    mine.total[x][i];
        __syncthreads();
        if (p.begin == 2 && tile + int(gridDim.y) >= p.tiles) pdl_launch_dependents();
        result.write(p, tile, first, rows, sums, reinterpret_cast<const float*>(shared + layout.scales_x));
        result.load_weight(p, tile + gridDim.y, rows);
    }
}

// ---- Which configuration

constexpr int INVALID = 1;  // cudaErrorInvalidValue

// Chunks of rows of x that a configuration needs, each as large as there is shared memory for; 0 if there is for none.
template <class C>
int chunks(Product p) {
    p.chunk = p.m < C::XS ? p.m : C::XS;
    while (p.chunk > 0 && Layout<C>(p).total > current_device().shared) --p.chunk;
    return p.chunk ? (p.m + p.chunk - 1) / p.chunk : 0;
}

// `busy`: blocks of threads a multiprocessor is given.
template <class C>
int launch(Product p, int busy, cudaStream_t stream) {
    const int count = chunks<C>(p);
    if (!count || (C::GROUPED && C::ROWS * (p.k / COLUMNS) > 4 * C::THREADS)) return INVALID;
    p.chunk = (p.m + count - 1) / count;
    p.tiles = p.swiglu ? (p.n / 2 + C::ROWS / 2 - 1) / (C::ROWS / 2) : (p.n + C::ROWS - 1) / C::ROWS;
    int grid = current_device().multiprocessors * busy / count;
    grid = grid < 1 ? 1 : grid < p.tiles ? grid : p.tiles;
    // Neighbours in the first dimension read the same weights.
    return start<quantized_mma<C>>(dim3(count, grid), C::THREADS, Layout<C>(p).total, stream, p);
}

// Values of K from which on a tile has so many warps, and warps below.
constexpr int LONG = 2048, LONG_WARPS = 16, SHORT_WARPS = 8;

// Bytes of shared memory from which on a multiprocessor is taken for one with so fast a memory that a queue must be deep.
constexpr int DEEP_SHARED = 160 * 1024;

// The configurations of a weight, by number, for measurements; `Config` says what they mean. BUSY: `busy` of `launch`.
template <class T, int BITS, bool GROUPED, int WARPS>
struct Table {
    static constexpr int DEEP = BITS == 4 ? 4 : 3;
    template <int ROWS, int STAGES, int TILES_X, int BUSY_>
    struct Row : Config<T, BITS, GROUPED, ROWS, WARPS, STAGES, TILES_X> {
        using Base = Config<T, BITS, GROUPED, ROWS, WARPS, STAGES, TILES_X>;
        static constexpr int BUSY = BUSY_;
    };
    //              ROWS STAGES TILES_X BUSY
    using V1 = Row<16, DEEP, 1, 1>;  // few tiles more than multiprocessors
    using V2 = Row<16, DEEP, 1, 2>;
    using V3 = Row<8, DEEP, 1, 1>;   // twice the blocks of threads
    using V4 = Row<8, DEEP, 1, 2>;
    using V5 = Row<8, 2, 1, 1>;      // little shared memory, or much of x
    using V6 = Row<16, 2, 2, 1>;     // more than 8 rows of x
    using V7 = Row<16, 2, 1, 1>;     // only measured, in bfloat16
    using V8 = Row<8, 2, 1, 3>;      // likewise
};
constexpr int VARIANTS = 9;

// Two tiles of x for more than 8 rows; tiles of 8 rows of W where those of 16 leave multiprocessors without work, and for
// int8, of which 16 rows take the registers that the next kernel is to begin with; but a short queue where that leaves
// room for more rows of x at once.
template <class T, int BITS, bool GROUPED, int WARPS>
int choose(const Product& p) {
    using Own = Table<T, BITS, GROUPED, WARPS>;
    const Device& device = current_device();
    const int least = chunks<typename Own::V5>(p);
    if (p.m > 8) {
        const int two_tiles = chunks<typename Own::V6>(p);
        return two_tiles && two_tiles < least ? 6 : 5;
    }
    if (device.shared < DEEP_SHARED) return 5;
    const auto rows_of_the_busiest = [&](int rows) {
        const int tiles = (p.n + rows - 1) / rows;
        return (tiles + device.multiprocessors - 1) / device.multiprocessors * rows;
    };
    const bool narrow = BITS == 8 || rows_of_the_busiest(8) * 8 < rows_of_the_busiest(16) * 7;
    const int deep = narrow ? chunks<typename Own::V3>(p) : chunks<typename Own::V1>(p);
    if (!deep || deep > least) return 5;
    return (narrow ? 3 : 1) + (WARPS == SHORT_WARPS);
}

template <class T, int BITS, bool GROUPED, int WARPS>
int launch(const Product& p, int variant, cudaStream_t stream) {
    using Own = Table<T, BITS, GROUPED, WARPS>;
    const auto as = [&](auto row) { return launch<typename decltype(row)::Base>(p, decltype(row)::BUSY, stream); };
    switch (variant > 0 ? variant : choose<T, BITS, GROUPED, WARPS>(p)) {
        case 1: return as(typename Own::V1());
        case 2: return as(typename Own::V2());
        case 3: return as(typename Own::V3());
        case 4: return as(typename Own::V4());
        case 5: return as(typename Own::V5());
        case 6: return as(typename Own::V6());
    }
    if constexpr (std::is_same_v<T, Bfloat16>) {
        if (variant == 7) return as(typename Own::V7());
        if (variant == 8) return as(typename Own::V8());
    }
    return INVALID;
}

template <class T, int BITS, bool GROUPED>
int launch(const Product& p, int variant, cudaStream_t stream) {
    return p.k >= LONG ? launch<T, BITS, GROUPED, LONG_WARPS>(p, variant, stream)
                       : launch<T, BITS, GROUPED, SHORT_WARPS>(p, variant, stream);
}

template <class T>
int launch(const Product& p, int bits, bool grouped, int variant, cudaStream_t stream) {
    if (bits == 4) return launch<T, 4, true>(p, variant, stream);
    return grouped ? launch<T, 8, true>(p, variant, stream) : launch<T, 8, false>(p, variant, stream);
}

}  // namespace

extern "C" int mimo_fast_variants() { return VARIANTS; }

// x [m, k], rows `stride` apart; words [n, k bits / 32]; scales [n, k / 128] if grouped, else [n]; zeros as scales, of
// float16; bias [n]; y and residual [m, n], or [m, n / 2] with swiglu; null for what there is not. k is a multiple of
// 128. words are aligned to 16 bytes; x, its rows and norm to 8. half: x, norm, scales, bias, residual and y are of
// float16, else of bfloat16; there is no norm of float16. variant: 0, or one of `mimo_fast_variants`. Returns a
// cudaError_t.
extern "C" int mimo_fast_quantized_mma(
    const void* x, const void* norm, const void* words, const void* scales, const void* zeros, const void* bias,
    const void* residual, void* y, int64_t stride, int m, int n, int k, int bits, int grouped, int swiglu, int half,
    int variant, float eps, cudaStream_t stream) {
    const auto as16 = [](const void* pointer) { return static_cast<const uint16_t*>(pointer); };
    const char* const begin = std::getenv("MIMO_FAST_PRODUCT_BEGIN");  // benchmarks/studies/chains.py
    const Product product{as16(x), as16(norm), static_cast<const uint4*>(words), as16(scales), as16(zeros), as16(bias),
                          as16(residual), static_cast<uint16_t*>(y), stride, m, n, k, swiglu, eps, 0, 0,
                          begin ? std::atoi(begin) : 0};
    const auto aligned = [](const void* pointer, int to) { return reinterpret_cast<uintptr_t>(pointer) % to == 0; };
    if (!aligned(x, 8) || !aligned(norm, 8) || !aligned(words, 16) || !aligned(scales, 2) || stride % 4) return INVALID;
    if (m < 1 || k < COLUMNS || k % COLUMNS || (bits == 4 && !grouped) || (half && norm)) return INVALID;
    return half ? launch<Float16>(product, bits, grouped, variant, stream)
                : launch<Bfloat16>(product, bits, grouped, variant, stream);
}
