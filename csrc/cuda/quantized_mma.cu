// Products of few rows with int4 or int8 weights on tensor cores; bfloat16 or float16 in and out, sums in float32.
//
//   y [M, N] = epilogues(norm(x) W^T + b)          units, their pairs and the order of sums: row_order.cuh
//
// Such a product is bound by the bytes of W as long as they are asked for early enough and little is done for each. A warp
// asks for, and multiplies, a unit of ROWS rows of W at once.
//
// A block of threads keeps its rows of x in shared memory, times the norm's weight and in the order of pairs, and goes
// through every gridDim.y-th tile of ROWS rows of W. Warp w has the units of class w of each tile. Each thread's words come through a queue of STAGES units in shared memory, which runs on from tile to tile; it reads only
// what it asked for itself, so the queue needs no barrier. After a tile the warps' sums are added in order, and the norm's
// row scale, bias, SwiGLU and residual follow.
//
//   bytes read     W once for each chunk of rows of x, x once for each block of threads
//   order of sums  given by K alone. Neither the rows that come with a row nor ROWS, STAGES or the grid change it, so a row
//                  is the same bit for bit.
//
// Weights (words, scales, zeros, norm, bias) are read before `pdl_wait`, that is while the kernel before this one may
// still run: none of them may be written by it (quantized_weight.py says what whoever makes a weight has to do).

#include "row_order.cuh"

namespace {

constexpr int ROWS = 16;  // of W a tile

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
};

// ---- Configurations

// T, BITS, GROUPED: of `Form`. WARPS: that share the columns of a tile, as many as there are classes of units.
// STAGES: units of a warp that are on their way beside the one in its registers. H100: 21 KB a multiprocessor hide the
//     latency of its memory (0.9 us at 3.1 TB/s over 132 of them); a stage of 16 warps is 16 KB of int4 or 32 KB of int8.
// TILES_X: of 8 rows of x, for each of which a unit's unpacked words are used again.
// BUFFERS: of the warps' sums; one takes another barrier and less shared memory.
template <class T_, int BITS_, bool GROUPED_, int WARPS_, int STAGES_, int TILES_X_, int BUFFERS_>
struct Config : Form<T_, BITS_, GROUPED_> {
    static constexpr int BITS = BITS_, WARPS = WARPS_, STAGES = STAGES_, TILES_X = TILES_X_;
    static constexpr int BUFFERS = BUFFERS_;
    static constexpr int THREADS = WARPS * 32;
    static constexpr int XS = 8 * TILES_X;
    // Threads a multiprocessor has registers for. 1024 have 64 each, which lets the next kernel begin beside this one; what
    // does not fit into those on every GPU has 128.
    static constexpr bool SMALL = TILES_X == 1 && BITS == 4 && BUFFERS == 2;
    static constexpr int RESIDENT = ARCHITECTURE == 900 && SMALL ? 1024 : 512;

    static_assert(STAGES >= 1 && TILES_X >= 1);
    static_assert(XS * ROWS <= THREADS, "a thread writes one result of a tile");
    static_assert(THREADS <= 1024);
};

// Where things lie in a block's shared memory, as bytes from its begin.
template <class C>
struct Layout {
    int x, sums, squares, sums_x, scales, total;

    __host__ __device__ Layout(const Product& p) {
        const int blocks = p.k / COLUMNS;
        int end = C::WARPS * C::STAGES * 2 * C::PARTS * 32 * 16;  // the queues come first
        const auto take = [&end](int bytes) {
            const int begin = end;
            end += (bytes + 15) / 16 * 16;
            return begin;
        };
        x = take(p.chunk * p.k * 2);                                      // [blocks, i, chunk, t, v] pairs
        sums = take(C::BUFFERS * C::WARPS * C::XS * (ROWS + 1) * 4);   // [buffer, warp, row of x, row of W]
        squares = take(p.norm ? blocks * C::XS * 4 : 0);                  // [blocks, row of x]
        sums_x = take(C::SUM_X ? blocks * C::XS * 4 : 0);                 // [blocks, row of x]
        scales = take(C::GROUPED ? 2 * ROWS * blocks * 4 : 0);          // [tile % 2, block, row of W]: scale, zero
        total = end;
    }
};

// Row r of a tile as a row of W, at most the last: half of them gate and half up where a result takes one of each.
__device__ inline int weight_row(const Product& p, int tile, int r) {
    const int half = ROWS / 2;
    const int row = p.swiglu ? r / half * (p.n / 2) + tile * half + r % half : tile * ROWS + r;
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
        const int step = p.k / COLUMNS * C::BITS, upper = weight_row(p, tile, lane / 4);
        at = p.words + int64_t(upper) * step + block * C::BITS + lane % 4;
        to_lower = (weight_row(p, tile, 8 + lane / 4) - upper) * step;
    }

    // Asks for the words of this unit, if there is one, and goes on to the next.
    __device__ void request(const Product& p, int warp, int lane, uint4* stage) {
        if (tile < p.tiles) {
            // Each chunk of rows of x reads all of W: of several, the first leaves it in L2 for the others.
            const uint64_t policy = gridDim.x == 1 ? policy_evict_first() : policy_evict_normal();
#pragma unroll
            for (int part = 0; part < C::PARTS; ++part) {
                cp_async(stage + part * 32 + lane, at + 4 * part, policy);
                cp_async(stage + (C::PARTS + part) * 32 + lane, at + to_lower + 4 * part, policy);
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
        const int blocks = p.k / COLUMNS, half = ROWS / 2 * blocks;
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
        if (4 * piece >= ROWS * blocks) return;
        int row = 4 * piece / blocks, block = 4 * piece % blocks;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t low = i < 2 ? scale.x : scale.y, high = C::BITS == 8 ? 0 : i < 2 ? zero.x : zero.y;
            to[block * ROWS + row] = prmt(low, high, i % 2 ? 0x7632 : 0x5410);
            if (++block == blocks) block = 0, ++row;
        }
    }
};

// ---- x

// Rows first, ... first + rows - 1 of x, times the norm's weight, in the order of pairs; and for each row and block of
// columns the sum of these and the sum of the squares of x. One row is read by 16 threads a block, several by four each:
// fewer exchanges between threads. The order of the sums is the same.
template <class C>
__device__ void stage_x(const Product& p, const Layout<C>& layout, unsigned char* shared, int first, int rows) {
    float* const sums = reinterpret_cast<float*>(shared + layout.sums_x);
    float* const squares = reinterpret_cast<float*>(shared + layout.squares);
    const int blocks = p.k / COLUMNS, t = threadIdx.x % 4;
    if (rows == 1) {
        uint32_t* const pairs = reinterpret_cast<uint32_t*>(shared + layout.x);
        const int v = threadIdx.x / 4 % 4;
        // All lanes of a warp go through the loop alike, for they shuffle.
        for (int begin = 0; begin < blocks; begin += C::THREADS / 16) {
            const int block = begin + threadIdx.x / 16, column = block * COLUMNS + first_column<C>(v, t);
            const bool real = block < blocks, writes = real && threadIdx.x % 16 == 0;
            Eight<C> x = Eight<C>::load(p.x + first * p.stride + column, real);
            if (p.norm) {
                const Eight<C> weight = Eight<C>::load(p.norm + column, real);
                const float square = x.sum(squared);
                if (writes) squares[block * C::XS] = square;
                x.multiply(weight);
            }
            if (C::SUM_X) {
                const float sum = x.sum(itself);
                if (writes) sums[block * C::XS] = sum;
            }
            if (real) x.store(pairs + block * 64 + 4 * t + v, 16);
        }
        return;
    }
    uint4* const pairs = reinterpret_cast<uint4*>(shared + layout.x);
    for (int block = threadIdx.x / 32; block < blocks; block += C::WARPS) {
        Quarter<C> weight, x[C::TILES_X];
        if (p.norm) weight = Quarter<C>::load(p.norm + block * COLUMNS, true);
#pragma unroll
        for (int tile = 0; tile < C::TILES_X; ++tile) {
            const int row = 8 * tile + threadIdx.x % 32 / 4;
            x[tile] = Quarter<C>::load(p.x + (first + row) * p.stride + block * COLUMNS, row < rows);
        }
#pragma unroll
        for (int tile = 0; tile < C::TILES_X; ++tile) {
            const int row = 8 * tile + threadIdx.x % 32 / 4;
            if (p.norm) {
                const float square = x[tile].sum(squared);
                if (t == 0 && row < rows) squares[block * C::XS + row] = square;
                x[tile].multiply(weight);
            }
            if (C::SUM_X) {
                const float sum = x[tile].sum(itself);
                if (t == 0 && row < rows) sums[block * C::XS + row] = sum;
            }
            uint4 sorted[4];
            x[tile].sort(sorted);
            if (row >= rows) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i) pairs[((block * 4 + i) * rows + row) * 4 + t] = sorted[i];
        }
    }
}

// ---- One unit

// What a thread has of the sums of its warp: of rows g and g + 8 of W with rows 2 t and 2 t + 1 of each tile of x.
template <class C>
struct Sums {
    float total[C::TILES_X][4] = {};

    // x(tile, i): the pairs (i, v) of row g of a tile of x. sum_x(tile, j): the sum over row 2 t + j of it.
    template <class X, class SumX>
    __device__ void add(const uint4 (&words)[2][C::PARTS], X x, SumX sum_x, const uint32_t* scales) {
        const int g = threadIdx.x % 32 / 4;
        float chain[C::TILES_X][2][4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t a[2][PAIRS];
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int v = 0; v < PAIRS; ++v) a[half][v] = weight_pair<C>(words[half], i, v);
#pragma unroll
            for (int tile = 0; tile < C::TILES_X; ++tile) {
                const uint4 b = x(tile, i);
                mma_m16n8k16<typename C::T>(chain[tile][0], a[0][0], a[1][0], a[0][1], a[1][1], b.x, b.y);
                mma_m16n8k16<typename C::T>(chain[tile][1], a[0][2], a[1][2], a[0][3], a[1][3], b.z, b.w);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Affine<C> affine = C::GROUPED ? Affine<C>::of(scales[half * 8 + g]) : Affine<C>::none();
#pragma unroll
            for (int tile = 0; tile < C::TILES_X; ++tile)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int i = half * 2 + j;
                    total[tile][i] =
                        affine.with_unit(total[tile][i], chain[tile][0][i], chain[tile][1][i], sum_x(tile, j));
                }
        }
    }
};

// ---- What follows the sums

// One result of a tile, of one thread: what is read for it while the sums are not there yet. With SwiGLU it takes two rows
// of W, whose values are the halves of a word.
template <class C>
struct Result {
    using T = typename C::T;
    uint32_t bias = 0, scale = 0;
    uint16_t residual = 0;
    float norm = 0;  // the scale of its row of x, which is the same in all tiles; 0: not known yet

    // Where a thread's result of a tile is: row x of the block's, row r of the tile's results, column of y.
    struct Place {
        int x, r, column, width;
        bool real;

        __device__ Place(const Product& p, int tile, int rows) {
            const int outputs = p.swiglu ? ROWS / 2 : ROWS;
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

    __device__ void write(const Product& p, int tile, int first, int rows, const float* sums, const float* squares) {
        const Place at(p, tile, rows);
        if (!at.real) return;
        if (norm == 0) norm = p.norm ? norm_scale(squares + at.x, C::XS, p.k, p.eps) : 1;
        const auto result = [&](int i) {
            const float* from = sums + at.x * (ROWS + 1) + at.r + i * (ROWS / 2);
            float sum = 0;
#pragma unroll
            for (int warp = 0; warp < C::WARPS; ++warp) sum += from[warp * C::XS * (ROWS + 1)];
            return product_of(sum, C::GROUPED ? 1 : widen<T>(uint16_t(scale >> 16 * i)), norm,
                              p.bias ? widen<T>(uint16_t(bias >> 16 * i)) : 0);
        };
        float value = result(0);
        if (p.swiglu) value = swiglu_of(value, result(1));
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
    const int thread = threadIdx.x, scales_size = ROWS * blocks;
    uint32_t* const all_scales = reinterpret_cast<uint32_t*>(shared + layout.scales);

    // The weights are asked for before the last kernel's results are there.
    constexpr int STAGE = 2 * C::PARTS * 32;
    uint4* const queue = reinterpret_cast<uint4*>(shared) + warp * C::STAGES * STAGE;
    Units<C> ahead(p, warp, lane);
#pragma unroll 1
    for (int stage = 0; stage < C::STAGES; ++stage) ahead.request(p, warp, lane, queue + stage * STAGE);
    pdl_launch_dependents();
    if (p.norm && thread < p.k / 64) prefetch_l2(p.norm + thread * 64);
    Result<C> result;
    result.load_weight(p, blockIdx.y, rows);
    Scales<C> scales;
    if (C::GROUPED) {
        scales.load(p, blockIdx.y, thread);
        scales.store(p, all_scales, thread);
    }
    float* const squares = reinterpret_cast<float*>(shared + layout.squares);
    pdl_wait();

    stage_x<C>(p, layout, shared, first, rows);
    __syncthreads();

    int stage = 0, turn = 0;
    for (int tile = blockIdx.y; tile < p.tiles; tile += gridDim.y, turn ^= 1) {
        result.load_residual(p, tile, first, rows);
        if (C::GROUPED) scales.load(p, tile + gridDim.y, thread);
        Sums<C> mine;
        for (int block = warp; block < blocks; block += C::WARPS) {
            const uint4* const x = reinterpret_cast<const uint4*>(shared + layout.x) + block * 16 * rows;
            const float* const sums_x = reinterpret_cast<const float*>(shared + layout.sums_x) + block * C::XS;
            cp_async_wait_group<C::STAGES - 1>();
            uint4* const here = queue + stage * STAGE;
            uint4 words[2][C::PARTS];
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int part = 0; part < C::PARTS; ++part) words[half][part] = here[(half * C::PARTS + part) * 32 + lane];
            ahead.request(p, warp, lane, here);
            stage = stage + 1 == C::STAGES ? 0 : stage + 1;
            const auto pairs = [&](int x_tile, int i) {
                const int row = 8 * x_tile + lane / 4;
                return row < rows ? x[(i * rows + row) * 4 + lane % 4] : uint4{0, 0, 0, 0};
            };
            mine.add(words, pairs, [&](int x_tile, int j) { return sums_x[8 * x_tile + 2 * (lane % 4) + j]; },
                     C::GROUPED ? all_scales + turn * scales_size + block * ROWS : nullptr);
        }
        if (C::GROUPED && tile + int(gridDim.y) < p.tiles)
            scales.store(p, all_scales + (turn ^ 1) * scales_size, thread);

        float* const sums = reinterpret_cast<float*>(shared + layout.sums) +
                            (C::BUFFERS == 2 ? turn : 0) * C::WARPS * C::XS * (ROWS + 1);
        if (C::BUFFERS == 1) __syncthreads();
#pragma unroll
        for (int x = 0; x < C::TILES_X; ++x)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                sums[(warp * C::XS + 8 * x + 2 * (lane % 4) + i % 2) * (ROWS + 1) + i / 2 * 8 + lane / 4] =
                    mine.total[x][i];
        __syncthreads();
        result.write(p, tile, first, rows, sums, squares);
        result.load_weight(p, tile + gridDim.y, rows);
    }
}

// ---- Which configuration

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
    if (!count || (C::GROUPED && ROWS * (p.k / COLUMNS) > 4 * C::THREADS)) return INVALID;
    p.chunk = (p.m + count - 1) / count;
    p.tiles = p.swiglu ? (p.n / 2 + ROWS / 2 - 1) / (ROWS / 2) : (p.n + ROWS - 1) / ROWS;
    int grid = current_device().multiprocessors * busy / count;
    grid = grid < 1 ? 1 : grid < p.tiles ? grid : p.tiles;
    // Neighbours in the first dimension read the same weights.
    return start<quantized_mma<C>>(dim3(count, grid), C::THREADS, Layout<C>(p).total, stream, p);
}

// The configurations of a weight, by number, for measurements; `Config` says what they mean. BUSY: `busy` of `launch`.
template <class T, int BITS, bool GROUPED, int WARPS>
struct Table {
    static constexpr int DEEP = BITS == 4 ? 4 : 3;
    template <int STAGES, int TILES_X, int BUFFERS, int BUSY_>
    struct Row : Config<T, BITS, GROUPED, WARPS, STAGES, TILES_X, BUFFERS> {
        using Base = Config<T, BITS, GROUPED, WARPS, STAGES, TILES_X, BUFFERS>;
        static constexpr int BUSY = BUSY_;
    };
    //             STAGES TILES_X BUFFERS BUSY
    using V1 = Row<2,     1,      2,      1>;  // what mostly is best at up to 8 rows
    using V2 = Row<DEEP,  1,      2,      2>;  // many tiles, or few columns
    using V3 = Row<2,     2,      1,      1>;  // more than 8 rows of x
    using V4 = Row<2,     1,      1,      1>;  // much of x
    using V5 = Row<1,     1,      1,      1>;  // little shared memory, or very much of x
    using V6 = Row<2,     1,      1,      2>;  // only measured
};
constexpr int VARIANTS = 7;

// Measured on an H100 (docs/LOG.md).
template <class T, int BITS, bool GROUPED, int WARPS>
int choose(const Product& p) {
    using Own = Table<T, BITS, GROUPED, WARPS>;
    // Each chunk of rows of x reads all of W again.
    const int least = chunks<typename Own::V5>(p);
    const auto takes = [&](int count) { return count && count <= least; };
    // Each takes a multiprocessor of its own where there are enough.
    const int wide = chunks<typename Own::V3>(p), tiles = (p.n + ROWS - 1) / ROWS;
    if (p.m > 8 && wide && wide < least && tiles * least > current_device().multiprocessors) return 3;
    // Two blocks a multiprocessor where there are many tiles and the shared memory lets both run.
    const bool two = WARPS == SHORT_CLASSES || (BITS == 4 && p.m == 1 && p.n >= 128 * current_device().multiprocessors);
    if (two && takes(chunks<typename Own::V2>(p))) return 2;
    return takes(chunks<typename Own::V1>(p)) ? 1 : takes(chunks<typename Own::V4>(p)) ? 4 : 5;
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
    return INVALID;
}

template <class T, int BITS, bool GROUPED>
int launch(const Product& p, int variant, cudaStream_t stream) {
    return p.k >= LONG ? launch<T, BITS, GROUPED, LONG_CLASSES>(p, variant, stream)
                       : launch<T, BITS, GROUPED, SHORT_CLASSES>(p, variant, stream);
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
    const Product product{as16(x), as16(norm), static_cast<const uint4*>(words), as16(scales), as16(zeros), as16(bias),
                          as16(residual), static_cast<uint16_t*>(y), stride, m, n, k, swiglu, eps, 0, 0};
    if (!aligned(x, 8) || !aligned(norm, 8) || !aligned(words, 16) || !aligned(scales, 2) || stride % 4) return INVALID;
    if (m < 1 || k < COLUMNS || k % COLUMNS || (bits == 4 && !grouped) || (half && norm)) return INVALID;
    return half ? launch<Float16>(product, bits, grouped, variant, stream)
                : launch<Bfloat16>(product, bits, grouped, variant, stream);
}
