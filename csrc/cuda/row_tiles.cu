// Products of 9 to 256 rows with int4, int8 or dense weights on tensor cores, with the bits that a row has alone; bfloat16
// or float16 in and out, sums in float32.
//
//   y [M, N] = epilogues(norm(x) W^T + b)          units, their pairs and the order of sums: row_order.cuh
//
// Between the few rows that the bytes of W bound and the many that arithmetic bounds, a product has to read W once and to
// multiply what it unpacked with as many rows of x as it can. quantized_mma.cu keeps x in a block's shared memory, so that
// its warps have to share the columns; here x comes in stages as W does, and warps share rows of both.
//
//   sort_x         one launch before: x, times the norm's weight, in the order of pairs, the sums over each row's units (int4)
//                  and the norm's scales. Each block of threads would do it anew.
//   block of threads: 32 WARPS_W rows of W, 8 TILES_X WARPS_X rows of x
//     GROUPS of WARPS_W x WARPS_X warps        have the classes of units between them, neighbours together
//     warp of a group                          32 rows of W, TILES_X tiles of 8 rows of x: of what it unpacks it has all
//                                              pairs of a unit in registers while the tiles pass
//   stage of a group: one unit of all these rows; they come by cp.async, STAGES - 1 ahead
//     x   [i, row, t] pieces of 16 bytes       a warp reads 512 bytes in a row: no bank twice
//     W   [8 rows, part, lane] pieces          likewise; dense, row g's piece t of four lies at t ^ g / 2, for ldmatrix
//
//   order of units  class by class, so that a sum over a class is finished before the next begins. With one group it is
//                   then added to what the thread keeps; with several it goes to shared memory, and all are added last.
//   bytes read      W once for each block of rows of x, and those of one weight run together: once from memory. x from L2
//                   once for each block of rows of W. Scales once.
//   independent     neither the other rows of x nor the tiles, stages or groups decide about a row's bits: row_order.cuh.
//
// Counted for a unit of 128 x 64 rows (W and x), int4, int8 and dense: 24.8, 32.8 and 48 KB come into shared memory and 80,
// 96 and 128 KB are read there; of a warp's 445, 490 and 292 instructions (sm_90) 64 are on tensor cores. Predicted for an
// H100 and not measured, a backbone layer's four products with 16, 32, 64, 128 and 256 rows take, times the floor by bytes
// or arithmetic: int4 2.1, 2.6, 4.5, 3.2, 2.6; int8 1.4, 1.6, 2.6, 3.1, 3.3; bfloat16 1.1, 1.2, 1.7, 2.2, 3.9
// (benchmarks/studies/row_tiles.py --predict).
//
// Weights are read before `pdl_wait`, as in quantized_mma.cu.

#include "row_order.cuh"

namespace {

struct Product {
    const uint16_t* x;
    const uint16_t* norm;
    const uint4* words;
    const uint16_t* scales;
    const uint16_t* zeros;
    const uint16_t* bias;
    const uint16_t* residual;
    uint16_t* y;
    // Of `Room`: what `sort_x` leaves.
    uint4* sorted;   // [K / 128, i, M, t]: pairs
    float* sums_x;   // [K / 128, M to whole fours]
    float* norms;    // [M to whole fours]
    int64_t stride;
    int m, n, k;
    int swiglu;
    float eps;
};

constexpr int MOST_ROWS = 1 << 16;

__host__ __device__ inline int to_fours(int m) { return (m + 3) / 4 * 4; }

// Where what `sort_x` leaves lies in the room that a call brings, as bytes from its begin.
struct Room {
    int64_t sums_x, norms, total;

    Room(int m, int k) {
        sums_x = int64_t(m) * k * 2;
        norms = sums_x + int64_t(to_fours(m)) * (k / COLUMNS) * 4;
        total = norms + to_fours(m) * 4;
    }
};

// ---- x

constexpr int SORT_THREADS = 128;

// A block of threads has a row, four threads a block of columns.
template <class F>
__global__ void __launch_bounds__(SORT_THREADS) sort_x(const Product p) {
    float* const squares = reinterpret_cast<float*>(dynamic_shared());
    const int row = blockIdx.x, t = threadIdx.x % 4, blocks = p.k / COLUMNS;
    pdl_launch_dependents();
    pdl_wait();
    // All lanes of a warp go through the loop alike, for they shuffle.
    for (int begin = 0; begin < blocks; begin += SORT_THREADS / 4) {
        const int block = begin + threadIdx.x / 4;
        const bool there = block < blocks, real = there && row < p.m;
        Quarter<F> x = Quarter<F>::load(p.x + row * p.stride + block * COLUMNS, real);
        if (p.norm) {
            const float square = x.sum(squared);
            if (there && t == 0) squares[block] = square;
            x.multiply(Quarter<F>::load(p.norm + block * COLUMNS, there));
        }
        if (F::SUM_X) {
            const float sum = x.sum(itself);
            if (there && t == 0) p.sums_x[block * to_fours(p.m) + row] = sum;
        }
        if (!real) continue;
        uint4 pairs[4];
        x.sort(pairs);
#pragma unroll
        for (int i = 0; i < 4; ++i) p.sorted[(int64_t(block * 4 + i) * p.m + row) * 4 + t] = pairs[i];
    }
    if (!p.norm) return;
    __syncthreads();
    if (threadIdx.x == 0) p.norms[row] = norm_scale(squares, 1, p.k, p.eps);
}

// ---- Configurations

// T, BITS, GROUPED: of `Form`. The others: see above.
template <class T_, int BITS_, bool GROUPED_, int WARPS_W_, int WARPS_X_, int TILES_X_, int GROUPS_, int STAGES_>
struct Config : Form<T_, BITS_, GROUPED_> {
    using Base = Form<T_, BITS_, GROUPED_>;
    static constexpr int WARPS_W = WARPS_W_, WARPS_X = WARPS_X_, TILES_X = TILES_X_;
    static constexpr int GROUPS = GROUPS_, STAGES = STAGES_;
    static constexpr int TILES_W = 2;  // of 16 rows of W a warp: what it reads of x serves both
    static constexpr int ROWS = 16 * TILES_W * WARPS_W, XS = 8 * TILES_X * WARPS_X;
    static constexpr int GROUP_THREADS = 32 * WARPS_W * WARPS_X, THREADS = GROUPS * GROUP_THREADS;
    static constexpr int WARPS = THREADS / 32, RESIDENT_WARPS = 8;  // that a multiprocessor has registers for: 255 a thread
    // Pieces of 16 bytes.
    static constexpr int X_STAGE = XS * 16, SUMS_STAGE = Base::SUM_X ? XS / 4 : 0, W_STAGE = ROWS * Base::BITS;
    static constexpr int STAGE = X_STAGE + SUMS_STAGE + W_STAGE;
    static constexpr int STRIDE = ROWS + 4;  // of a row of sums, in floats

    static_assert(STAGES >= 2 && GROUPS <= 8 && LONG_CLASSES % GROUPS == 0 && SHORT_CLASSES % GROUPS == 0);
};

// Where things lie in a block's shared memory, as bytes from its begin.
template <class C>
struct Layout {
    static constexpr int QUEUE = 16 * C::GROUPS * C::STAGES * C::STAGE, SUMS = 4 * C::XS * C::STRIDE;
    int sums, scales, total;

    __host__ __device__ Layout(const Product& p) {
        const int blocks = p.k / COLUMNS, classes = classes_of(p.k) < blocks ? classes_of(p.k) : blocks;
        // [class, row of x, row of W]; with one group the sum over all, in the queue's place.
        sums = C::GROUPS == 1 ? 0 : QUEUE;
        scales = C::GROUPS == 1 ? (QUEUE > SUMS ? QUEUE : SUMS) : QUEUE + classes * SUMS;
        total = scales + (C::GROUPED ? 4 * C::ROWS * blocks : 0);  // [block, row of W]: scale, zero
    }
};

// Row r of a tile as a row of W, at most the last: of 16 rows 8 gate and 8 up where a result takes one of each.
template <class C>
__device__ inline int weight_row(const Product& p, int tile, int r) {
    const int half = p.n / 2;
    if (!p.swiglu) return tile * C::ROWS + r < p.n ? tile * C::ROWS + r : p.n - 1;
    const int row = tile * (C::ROWS / 2) + r / 16 * 8 + r % 8;
    return (row < half ? row : half - 1) + (r & 8 ? half : 0);
}

template <class C>
__device__ inline void sync_group(int group) {
    if (C::GROUPS == 1)
        __syncthreads();
    else
        barrier<C::GROUP_THREADS>(1 + group);
}

// ---- Units

// The units of a group, in order.
struct Units {
    int unit, end, block;

    __device__ Units(const Product& p, int group, int groups) {
        const int each = classes_of(p.k) / groups, blocks = p.k / COLUMNS;
        unit = block = group * each;
        end = unit + each < blocks ? unit + each : blocks;
    }

    __device__ bool real() const { return unit < end; }

    // Whether the next is of another class.
    __device__ bool next(const Product& p) {
        block += classes_of(p.k);
        if (block < p.k / COLUMNS) return false;
        block = ++unit;
        return true;
    }
};

// ---- Loads

// What a thread copies of every unit, from where: all that does not follow from the unit.
template <class C>
struct Copies {
    static constexpr int WARPS = C::GROUP_THREADS / 32, EIGHTS = C::ROWS / 8 / WARPS;  // of 8 rows of W a warp
    static constexpr int ROW_PIECES = C::XS * 4;                                       // of all rows of x, of one i
    static constexpr int PLACES = ROW_PIECES > C::GROUP_THREADS ? ROW_PIECES / C::GROUP_THREADS : 1;
    int words[EIGHTS], x[PLACES], sums_x;

    static_assert(C::ROWS / 8 % WARPS == 0 && C::X_STAGE % C::GROUP_THREADS == 0);
    static_assert(ROW_PIECES % C::GROUP_THREADS == 0 || C::GROUP_THREADS % ROW_PIECES == 0);
    static_assert(C::SUMS_STAGE <= C::GROUP_THREADS);

    // Beyond the last row of x the last comes again: a column of B reaches no other column's sums.
    __device__ Copies(const Product& p, int tile, int first, int thread) {
        const int lane = thread % 32;
#pragma unroll
        for (int e = 0; e < EIGHTS; ++e)
            words[e] = weight_row<C>(p, tile, (thread / 32 + e * WARPS) * 8 + lane / 4) * (p.k / COLUMNS * C::BITS) + lane % 4;
#pragma unroll
        for (int place = 0; place < PLACES; ++place) {
            const int q = thread + place * C::GROUP_THREADS, row = first + q % ROW_PIECES / 4;
            x[place] = (q / ROW_PIECES * p.m + (row < p.m ? row : p.m - 1)) * 4 + q % 4;
        }
        const int four = first + 4 * thread;
        sums_x = four < p.m ? four : to_fours(p.m) - 4;
    }

    __device__ void request_words(const Product& p, int block, int thread, uint4* stage) const {
        const int lane = thread % 32;
        uint4* const to = stage + C::X_STAGE + C::SUMS_STAGE + thread / 32 * C::PARTS * 32 +
                          (C::BITS == 16 ? lane ^ lane / 8 : lane);
#pragma unroll
        for (int e = 0; e < EIGHTS; ++e) {
            const uint4* const from = p.words + (words[e] + block * C::BITS);
#pragma unroll
            for (int part = 0; part < C::PARTS; ++part)
                cp_async(to + (e * WARPS * C::PARTS + part) * 32, from + 4 * part);
        }
    }

    __device__ void request_x(const Product& p, int block, int thread, uint4* stage) const {
#pragma unroll
        for (int n = 0; n < C::X_STAGE / C::GROUP_THREADS; ++n) {
            const int i = n * C::GROUP_THREADS / ROW_PIECES;
            cp_async(stage + thread + n * C::GROUP_THREADS, p.sorted + ((block * 4 + i) * p.m * 4 + x[n % PLACES]));
        }
        if (C::SUM_X && thread < C::SUMS_STAGE)
            cp_async(stage + C::X_STAGE + thread,
                     reinterpret_cast<const uint4*>(p.sums_x + block * to_fours(p.m) + sums_x));
    }
};

// A tile's scales and zeros, as [block, row].
template <class C>
__device__ void load_scales(const Product& p, int tile, uint32_t* to) {
    const int blocks = p.k / COLUMNS;
    for (int q = threadIdx.x; q < C::ROWS * blocks; q += C::THREADS) {
        const int row = q / blocks, block = q - row * blocks;
        const int64_t place = int64_t(weight_row<C>(p, tile, row)) * blocks + block;
        const uint32_t zero = C::BITS == 4 && p.zeros ? p.zeros[place] : 0;
        to[block * C::ROWS + row] = zero << 16 | p.scales[place];
    }
}

// ---- Products

// A warp's sums: of 32 rows of W with 8 TILES_X rows of x.
template <class C>
struct Sums {
    using T = typename C::T;
    float total[C::TILES_W][C::TILES_X][4] = {};  // over the units of a class
    float kept[C::TILES_W][C::TILES_X][4] = {};   // over the classes that are finished

    // stage: a unit. row, row_x: the first of the warp's in it. scales: of the unit's rows.
    __device__ void add_unit(const uint4* stage, const uint32_t* scales, int row, int row_x) {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        const uint4* const w = stage + C::X_STAGE + C::SUMS_STAGE + row / 8 * C::PARTS * 32;
        const uint4* const x = stage + (row_x + g) * 4 + t;
        const float* const sums_x = reinterpret_cast<const float*>(stage + C::X_STAGE) + row_x + 2 * t;
        // Of pairs (i, 2 of) and (i, 2 of + 1): rows g, g + 8, and the same of the next pair.
        uint32_t a[C::TILES_W][4][2][4];
        Affine<C> affine[C::TILES_W][2];
#pragma unroll
        for (int tile = 0; tile < C::TILES_W; ++tile) {
            if constexpr (C::BITS == 16) {
                // Lane l names row l % 16 of the tile, and of the next four pieces that of l / 16.
                const uint4* const named = w + (2 * tile + lane / 8 % 2) * C::PARTS * 32;
                const int r = lane % 8;
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int of = 0; of < 2; ++of)
                        ldmatrix_x4(a[tile][i][of], named + i * 32 + r * 4 + ((2 * of + lane / 16) ^ r / 2));
            } else {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint4 words[C::PARTS];
#pragma unroll
                    for (int part = 0; part < C::PARTS; ++part)
                        words[part] = w[((2 * tile + half) * C::PARTS + part) * 32 + lane];
#pragma unroll
                    for (int i = 0; i < 4; ++i)
#pragma unroll
                        for (int v = 0; v < PAIRS; ++v)
                            a[tile][i][v / 2][v % 2 * 2 + half] = weight_pair<C>(words, i, v);
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half)
                affine[tile][half] =
                    C::GROUPED ? Affine<C>::of(scales[row + 16 * tile + 8 * half + g]) : Affine<C>::none();
        }
#pragma unroll
        for (int tile_x = 0; tile_x < C::TILES_X; ++tile_x) {
            float chain[C::TILES_W][2][4] = {};
            float2 both{};
            if (C::SUM_X) both = *reinterpret_cast<const float2*>(sums_x + 8 * tile_x);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint4 b = x[(i * C::XS + 8 * tile_x) * 4];
#pragma unroll
                for (int tile = 0; tile < C::TILES_W; ++tile) {
                    const auto& [low, high] = a[tile][i];
                    mma_m16n8k16<T>(chain[tile][0], low[0], low[1], low[2], low[3], b.x, b.y);
                    mma_m16n8k16<T>(chain[tile][1], high[0], high[1], high[2], high[3], b.z, b.w);
                }
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float sum_x = C::SUM_X ? (j ? both.y : both.x) : 0;
#pragma unroll
                for (int tile = 0; tile < C::TILES_W; ++tile)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float& sum = total[tile][tile_x][2 * half + j];
                        sum = affine[tile][half].with_unit(sum, chain[tile][0][2 * half + j],
                                                           chain[tile][1][2 * half + j], sum_x);
                    }
            }
        }
    }

    // After the last unit of a class.
    __device__ void keep() {
#pragma unroll
        for (int tile = 0; tile < C::TILES_W; ++tile)
#pragma unroll
            for (int tile_x = 0; tile_x < C::TILES_X; ++tile_x)
#pragma unroll
                for (int i = 0; i < 4; ++i) kept[tile][tile_x][i] += total[tile][tile_x][i];
    }

    __device__ void begin_class() {
#pragma unroll
        for (int tile = 0; tile < C::TILES_W; ++tile)
#pragma unroll
            for (int tile_x = 0; tile_x < C::TILES_X; ++tile_x)
#pragma unroll
                for (int i = 0; i < 4; ++i) total[tile][tile_x][i] = 0;
    }

    // As [row of x, row of W].
    __device__ static void store(const float (&from)[C::TILES_W][C::TILES_X][4], float* to, int row, int row_x) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int tile = 0; tile < C::TILES_W; ++tile)
#pragma unroll
            for (int tile_x = 0; tile_x < C::TILES_X; ++tile_x)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    to[(row_x + 8 * tile_x + lane % 4 * 2 + i % 2) * C::STRIDE + row + 16 * tile + i / 2 * 8 +
                       lane / 4] = from[tile][tile_x][i];
    }
};

// What follows the sums; neighbouring threads have neighbouring columns of y.
template <class C, bool SWIGLU>
__device__ void write(const Product& p, const float* sums, int tile, int first) {
    using T = typename C::T;
    constexpr int OUTPUTS = SWIGLU ? C::ROWS / 2 : C::ROWS;
    const int width = SWIGLU ? p.n / 2 : p.n, classes = classes_of(p.k), blocks = p.k / COLUMNS;
    const int count = C::GROUPS == 1 ? 1 : classes < blocks ? classes : blocks;
    for (int q = threadIdx.x; q < C::XS * OUTPUTS; q += C::THREADS) {
        const int x = q / OUTPUTS, r = q % OUTPUTS, column = tile * OUTPUTS + r;
        if (first + x >= p.m || column >= width) continue;
        const float norm = p.norm ? p.norms[first + x] : 1;
        const auto result = [&](int row, int of_w) {
            const float* const from = sums + x * C::STRIDE + row;
            float sum = 0;
            for (int i = 0; i < count; ++i) sum += from[i * C::XS * C::STRIDE];
            return product_of(sum, C::BITS == 8 && !C::GROUPED ? widen<T>(p.scales[of_w]) : 1, norm,
                              p.bias ? widen<T>(p.bias[of_w]) : 0);
        };
        float value;
        if (SWIGLU) {
            const int row = r / 8 * 16 + r % 8;
            value = swiglu_of(result(row, column), result(row + 8, column + width));
        } else {
            value = result(r, column);
        }
        const int64_t place = int64_t(first + x) * width + column;
        if (p.residual) value += widen<T>(p.residual[place]);
        p.y[place] = narrow<T>(value);
    }
}

// ---- The kernel

template <class C>
__global__ void __launch_bounds__(C::THREADS, C::RESIDENT_WARPS / C::WARPS) row_tiles(const Product p) {
    unsigned char* const shared = dynamic_shared();
    const Layout<C> layout(p);
    const int group = C::GROUPS == 1 ? 0 : threadIdx.x / C::GROUP_THREADS;
    const int thread = threadIdx.x - group * C::GROUP_THREADS;
    const int row = thread / 32 / C::WARPS_X * 16 * C::TILES_W, row_x = thread / 32 % C::WARPS_X * 8 * C::TILES_X;
    const int first = blockIdx.x * C::XS, tile = blockIdx.y;
    uint4* const queue = reinterpret_cast<uint4*>(shared) + group * C::STAGES * C::STAGE;
    float* const all_sums = reinterpret_cast<float*>(shared + layout.sums);
    uint32_t* const scales = reinterpret_cast<uint32_t*>(shared + layout.scales);

    // Weights are asked for before the last kernel's results are there.
    const Copies<C> copies(p, tile, first, thread);
    Units ahead(p, group, C::GROUPS);
#pragma unroll 1
    for (int stage = 0; stage < C::STAGES - 1 && ahead.real(); ++stage, ahead.next(p))
        copies.request_words(p, ahead.block, thread, queue + stage * C::STAGE);
    if (C::GROUPED) load_scales<C>(p, tile, scales);
    pdl_launch_dependents();
    pdl_wait();
    ahead = Units(p, group, C::GROUPS);
#pragma unroll 1
    for (int stage = 0; stage < C::STAGES - 1; ++stage) {
        if (ahead.real()) {
            copies.request_x(p, ahead.block, thread, queue + stage * C::STAGE);
            ahead.next(p);
        }
        cp_async_commit_group();
    }
    // All have stored their part of the scales.
    if (C::GROUPED && C::GROUPS > 1) __syncthreads();

    Sums<C> sums;
    Units here(p, group, C::GROUPS);
    int stage = 0;
#pragma unroll 1
    while (here.real()) {
        cp_async_wait_group<C::STAGES - 2>();
        // This unit is there, and all have done with the one before, whose stage is free.
        sync_group<C>(group);
        if (ahead.real()) {
            uint4* const to = queue + (stage ? stage - 1 : C::STAGES - 1) * C::STAGE;
            copies.request_words(p, ahead.block, thread, to);
            copies.request_x(p, ahead.block, thread, to);
            ahead.next(p);
        }
        cp_async_commit_group();
        sums.add_unit(queue + stage * C::STAGE, C::GROUPED ? scales + here.block * C::ROWS : nullptr, row, row_x);
        stage = stage + 1 == C::STAGES ? 0 : stage + 1;
        const int of_class = here.unit;
        if (!here.next(p)) continue;
        if (C::GROUPS == 1)
            sums.keep();
        else
            Sums<C>::store(sums.total, all_sums + of_class * C::XS * C::STRIDE, row, row_x);
        sums.begin_class();
    }
    cp_async_wait_group<0>();
    if (C::GROUPS == 1) {
        // The sums take the place of the queue.
        __syncthreads();
        Sums<C>::store(sums.kept, all_sums, row, row_x);
    }
    __syncthreads();
    if (p.swiglu)
        write<C, true>(p, all_sums, tile, first);
    else
        write<C, false>(p, all_sums, tile, first);
}

// ---- Which configuration

template <class C>
bool fits(const Product& p) { return Layout<C>(p).total <= current_device().shared; }

template <class C>
dim3 grid_of(const Product& p) {
    const int outputs = p.swiglu ? C::ROWS / 2 : C::ROWS, width = p.swiglu ? p.n / 2 : p.n;
    // Neighbours read the same weights.
    return dim3((p.m + C::XS - 1) / C::XS, (width + outputs - 1) / outputs);
}

template <class C>
int launch(const Product& p, cudaStream_t stream) {
    if (!fits<C>(p)) return INVALID;
    const int squares = p.norm ? p.k / COLUMNS * 4 : 0;
    if (const int error = start<sort_x<typename C::Base>>(dim3(to_fours(p.m)), SORT_THREADS, squares, stream, p))
        return error;
    return start<row_tiles<C>>(grid_of<C>(p), C::THREADS, Layout<C>(p).total, stream, p);
}

// The configurations of a weight, by number.
template <class T, int BITS, bool GROUPED>
struct Table {
    template <int... SIZES>
    using Row = Config<T, BITS, GROUPED, SIZES...>;
    static constexpr int MANY = BITS == 16 ? 4 : 8, DEEP = BITS == 16 ? 3 : 2;
    //           WARPS_W WARPS_X TILES_X GROUPS STAGES   rows of W x rows of x
    using V1 = Row<1, 1, 2, MANY, DEEP>;  // 32 x 16     few rows of x, or of both
    using V2 = Row<1, 1, 2, 4, 2>;        // 32 x 16     the same in less shared memory
    using V3 = Row<1, 1, 4, 4, 2>;        // 32 x 32     few rows of W
    using V4 = Row<2, 2, 4, 1, 2>;        // 64 x 64     fits everywhere
    using V5 = Row<8, 1, 4, 1, 3>;        // 256 x 32    many rows of W, up to 32 of x
    using V6 = Row<4, 2, 4, 1, 3>;        // 128 x 64
    using V7 = Row<2, 4, 4, 1, 3>;        // 64 x 128    W but once for 128 rows from L2, too; x more often
};
constexpr int VARIANTS = 8;

// Calls `of(configuration, its number)` for each, those with the largest tiles first.
template <class Own, class Of>
void each(Of of) {
    of(typename Own::V7(), 7), of(typename Own::V6(), 6), of(typename Own::V5(), 5), of(typename Own::V4(), 4);
    of(typename Own::V3(), 3), of(typename Own::V1(), 1), of(typename Own::V2(), 2);
}

// Clock cycles, predicted and not measured. With eight warps a multiprocessor multiplies 10 pairs of rows of W and x over a
// unit a cycle (0.63 of what wgmma does), fewer where instructions take longer (as counted for sm_90); its tensor cores
// wait with fewer warps, and it gets 25 bytes a cycle from L2.
template <class C>
float cycles(const Product& p) {
    constexpr float PAIRS_A_CYCLE = C::BITS == 16 ? 10 : C::BITS == 4 ? 9.2f : 8.4f, BYTES_A_CYCLE = 25, BEGIN_AND_END = 3000;
    const dim3 grid = grid_of<C>(p);
    const int tiles = grid.x * grid.y, most = (tiles - 1) / current_device().multiprocessors + 1;
    const int warps = C::WARPS * most < C::RESIDENT_WARPS ? C::WARPS * most : C::RESIDENT_WARPS;
    const float products = C::ROWS * C::XS / PAIRS_A_CYCLE * C::RESIDENT_WARPS / warps;
    const float copies = 16 * C::STAGE / BYTES_A_CYCLE;
    return most * (p.k / COLUMNS * (products > copies ? products : copies) + BEGIN_AND_END);
}

// The configuration that is predicted to take least, of equals that with the larger tiles; 0 for none.
template <class T, int BITS, bool GROUPED>
int choose(const Product& p, float* least) {
    constexpr float EQUAL = 1.03f;
    int best = 0;
    each<Table<T, BITS, GROUPED>>([&](auto config, int variant) {
        using C = decltype(config);
        if (!fits<C>(p)) return;
        const float time = cycles<C>(p);
        if (!best || time * EQUAL < *least) best = variant, *least = time;
    });
    return best;
}

struct Launch {
    int variant;
    cudaStream_t stream;

    template <class T, int BITS, bool GROUPED>
    int with(const Product& p) const {
        float time = 0;
        const int chosen = variant > 0 ? variant : choose<T, BITS, GROUPED>(p, &time);
        int error = INVALID;
        each<Table<T, BITS, GROUPED>>([&](auto config, int number) {
            if (number == chosen) error = launch<decltype(config)>(p, stream);
        });
        return error;
    }
};

struct Choice {
    float* time;

    template <class T, int BITS, bool GROUPED>
    int with(const Product& p) const { return choose<T, BITS, GROUPED>(p, time); }
};

// `Launch` or `Choice` for a form of weights; NONE where there are no kernels.
template <int NONE, class Of>
int dispatch(const Of& of, const Product& p, int bits, bool grouped, bool half) {
    if (bits == 16) return half || grouped ? NONE : of.template with<Bfloat16, 16, false>(p);
    if (bits == 4 && !grouped) return NONE;
    if (half)
        return bits == 4 ? of.template with<Float16, 4, true>(p)
               : grouped ? of.template with<Float16, 8, true>(p)
                         : of.template with<Float16, 8, false>(p);
    return bits == 4 ? of.template with<Bfloat16, 4, true>(p)
           : grouped ? of.template with<Bfloat16, 8, true>(p)
                     : of.template with<Bfloat16, 8, false>(p);
}

}  // namespace

extern "C" int mimo_fast_row_tiles_variants() { return VARIANTS; }

// Bytes that a product of m rows of k values takes for its sorted x.
extern "C" int64_t mimo_fast_row_tiles_room(int m, int k) { return Room(m, k).total; }

// The configuration that a product takes, 0 for none, and for how many clock cycles it is predicted.
extern "C" int mimo_fast_row_tiles_choice(int m, int n, int k, int bits, int grouped, int swiglu, int half, float* time) {
    Product product{};
    product.m = m, product.n = n, product.k = k, product.swiglu = swiglu;
    return dispatch<0>(Choice{time}, product, bits, grouped, half);
}

// Arguments as of `mimo_fast_quantized_mma`. bits 16: words are a dense weight [n, k] of bfloat16, and there are neither
// scales nor zeros. room: `mimo_fast_row_tiles_room` bytes, aligned to 16. variant: 0, or one of
// `mimo_fast_row_tiles_variants`. Returns a cudaError_t.
extern "C" int mimo_fast_row_tiles(const void* x, const void* norm, const void* words, const void* scales,
                                   const void* zeros, const void* bias, const void* residual, void* y, void* room,
                                   int64_t stride, int m, int n, int k, int bits, int grouped, int swiglu, int half,
                                   int variant, float eps, cudaStream_t stream) {
    const Room places(m, k);
    unsigned char* const begin = static_cast<unsigned char*>(room);
    const Product product{as16(x), as16(norm), static_cast<const uint4*>(words), as16(scales), as16(zeros), as16(bias),
                          as16(residual), static_cast<uint16_t*>(y), reinterpret_cast<uint4*>(begin),
                          reinterpret_cast<float*>(begin + places.sums_x), reinterpret_cast<float*>(begin + places.norms),
                          stride, m, n, k, swiglu, eps};
    if (!aligned(x, 8) || !aligned(norm, 8) || !aligned(words, 16) || !aligned(room, 16) || stride % 4) return INVALID;
    // Places in W and in the sorted x are numbers of 32 bits.
    if (m > MOST_ROWS || int64_t(n) * k * bits / 128 > INT32_MAX) return INVALID;
    if (m < 1 || n < 1 || k < COLUMNS || k % COLUMNS || (swiglu && n % 2) || (half && norm)) return INVALID;
    return dispatch<INVALID>(Launch{variant, stream}, product, bits, grouped, half);
}
