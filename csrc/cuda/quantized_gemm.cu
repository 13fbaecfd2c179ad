// Products of many rows with int4 or int8 weights on tensor cores, W unpacked in registers; bfloat16 or float16 in and
// out, sums in float32.
//
//   y [M, N] = epilogues(x W^T + b)                layout of W: mimo_fast/kernels/matmul/quantized_weight.py
//
// Such a product is bound by arithmetic: what each value of W costs has to be shared by many rows of x. W is the operand
// with 16 rows (A), x the one with 8 columns (B); a warp unpacks 16 x 16 values of W and multiplies them with TILES_X
// tiles of 8 rows of x. No other warp of its block of threads has these rows of W.
//
//   block of threads: 64 TILES_W rows of W, 8 TILES_X rows of x
//     two groups of four warps                 have the even and the odd blocks of 128 columns
//     warp of a group                          16 TILES_W rows of W, all rows of x
//   stage of a group: one block of 128 columns of these rows; they come by cp.async, STAGES - 1 ahead
//     x   [row, 16 pieces of 16 bytes]         piece c lies at c ^ row % 8: ldmatrix meets no bank twice
//     W   [row, BITS pieces of 16 bytes]       piece c at c ^ a function of the row, likewise
//
// Columns of one instruction are 16 neighbours, for those are what ldmatrix gives: thread t of four has columns 2 t, 2 t +
// 1, 2 t + 8 and 2 t + 9. In W these are one plane of as many neighbouring words, so two words are first made one of
// their lower and one of their upper halves; then a shift and a mask give two neighbouring columns.
//
// Values of W are rounded to T as a library's product would read them:
//   int4            T((q - 8 - i) scale + T(-f scale)), zero = i + f, i whole: one rounding, but for that of the second
//                   term, at most 2^-10 of a step of q in bfloat16
//   int8 in groups  T((q - 128) scale)
//   int8 by row     q - 128, exactly: the sum is multiplied by the scale
//
//   order of sums   blocks of 128 columns of a group, in each 16 columns at a time; the even blocks' sum plus the odd
//                   ones'. Nothing but K and the format decides about it: a row is the same bit for bit whatever rows
//                   come with it, and whatever the tiles are. There are no atomics.

#include <type_traits>

#include "quantized.cuh"

namespace {

constexpr int GROUPS = 2, GROUP_WARPS = 4, GROUP_THREADS = 32 * GROUP_WARPS, THREADS = GROUPS * GROUP_THREADS;
constexpr int X_PIECES = COLUMNS * 2 / 16;

struct Product {
    const uint16_t* x;
    const uint4* words;
    const uint16_t* scales;
    const uint16_t* zeros;
    const uint16_t* bias;
    const uint16_t* residual;
    uint16_t* y;
    int64_t stride;
    int m, n, k;
    int swiglu;
};

// T, BITS, GROUPED: as in quantized_mma.cu. TILES_W: of 16 rows of W a warp. TILES_X: of 8 rows of x.
template <class T_, int BITS_, bool GROUPED_, int TILES_W_, int TILES_X_, int STAGES_>
struct Config {
    using T = T_;
    static constexpr bool GROUPED = GROUPED_;
    static constexpr int BITS = BITS_, TILES_W = TILES_W_, TILES_X = TILES_X_, STAGES = STAGES_;
    static constexpr int WARP_ROWS = 16 * TILES_W, ROWS = GROUP_WARPS * WARP_ROWS, XS = 8 * TILES_X;
    // Pieces of 16 bytes.
    static constexpr int X_STAGE = XS * X_PIECES, STAGE = X_STAGE + ROWS * BITS;
    static constexpr int QUEUE = GROUPS * STAGES * STAGE;
    static constexpr int SCALES = GROUPED ? GROUPS * ROWS / 2 : 0;
    static constexpr int STRIDE = ROWS + 4;  // of a row of sums, in floats: a warp's stores meet no bank twice
    static constexpr int SUMS = GROUPS * XS * STRIDE / 4;
    static constexpr int SHARED = 16 * (QUEUE + SCALES > SUMS ? QUEUE + SCALES : SUMS);
    // A part of a stage: what a thread unpacks from one set of words.
    static constexpr int PARTS = BITS == 4 ? 2 : 4, PLANES = 8 / PARTS;

    static_assert(BITS == 8 || (BITS == 4 && GROUPED));
    static_assert(STAGES >= 2 && TILES_X % 2 == 0);
};

// ---- Unpacking

// What two values of W take, of one row and block: both halves of a word alike. `from` of int4: minus what is to be taken
// from the unpacked value.
struct Affine {
    uint32_t scale, from, term;
};

template <class C>
__device__ inline uint32_t value_pair(uint32_t word, int shift, const Affine& affine) {
    using T = typename C::T;
    const uint32_t q = Unpack<T, C::BITS>::pair(word, shift);
    if constexpr (C::BITS == 4) return fma_pairs<T>(add_pairs<T>(q, affine.from), affine.scale, affine.term);
    if constexpr (C::GROUPED) return mul_pairs<T>(q, affine.scale);
    return q;
}

// Row r of a tile as a row of W, at most the last: of 16 rows 8 gate and 8 up where a result takes one of each.
template <class C>
__device__ inline int weight_row(const Product& p, int tile, int r) {
    if (!p.swiglu) {
        const int row = tile * C::ROWS + r;
        return row < p.n ? row : p.n - 1;
    }
    const int half = p.n / 2, row = tile * (C::ROWS / 2) + r / 16 * 8 + r % 8;
    return (row < half ? row : half - 1) + (r & 8 ? half : 0);
}

// Where piece c of row r of W's stage lies in it.
template <class C>
__device__ inline int place_of(int r, int c) {
    return r * C::BITS + (C::BITS == 4 ? c ^ (r & 2) : c ^ (r & 3) * 2);
}

// ---- Scales

// Of a warp's rows in one block of columns, between their load and their use: lane l has rows l, l + 32, ...
template <class C>
struct Scales {
    using T = typename C::T;
    static constexpr int EACH = (C::WARP_ROWS + 31) / 32;
    uint16_t scale[EACH] = {}, zero[EACH] = {};

    __device__ void load(const Product& p, int tile, int first, int lane, int block) {
        const int blocks = p.k / COLUMNS;
        if (block >= blocks) return;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int r = lane + 32 * i;
            if (C::WARP_ROWS % 32 && r >= C::WARP_ROWS) continue;
            const int64_t place = int64_t(weight_row<C>(p, tile, first + r)) * blocks + block;
            scale[i] = p.scales[place];
            if (C::BITS == 4 && p.zeros) zero[i] = p.zeros[place];
        }
    }

    // {scale, term}, {from, from}
    __device__ void store(uint2* to, int lane) const {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int r = lane + 32 * i;
            if (C::WARP_ROWS % 32 && r >= C::WARP_ROWS) continue;
            if (C::BITS == 8) {
                to[r] = make_uint2(scale[i], 0);
                continue;
            }
            const float exact = from_half(zero[i]);
            // So far whole numbers are exact in every T; what is beyond goes into the term.
            const float near = rintf(exact), whole = near < -64 ? -64 : near > 64 ? 64 : near;
            const uint32_t term = narrow<T>((whole - exact) * widen<T>(scale[i]));
            const uint32_t from = narrow<T>(-(Unpack<T, C::BITS>::OFFSET + whole));
            to[r] = make_uint2(term << 16 | scale[i], from << 16 | from);
        }
    }

    __device__ static Affine of(const uint2& both) {
        return {prmt(both.x, both.x, 0x1010), both.y, prmt(both.x, both.x, 0x3232)};
    }
};

// ---- Loads

template <class C>
__device__ inline void request_words(const Product& p, int tile, int first, int lane, int block, uint4* stage) {
    const int step = p.k / COLUMNS * C::BITS, c = lane % C::BITS;
#pragma unroll
    for (int i = 0; i < C::WARP_ROWS * C::BITS / 32; ++i) {
        const int r = first + lane / C::BITS + 32 / C::BITS * i;
        const int64_t place = int64_t(weight_row<C>(p, tile, r)) * step + block * C::BITS + c;
        cp_async(stage + C::X_STAGE + place_of<C>(r, c), p.words + place);
    }
}

template <class C>
__device__ inline void request_x(const Product& p, int first, int thread, int block, uint4* stage) {
    const int c = thread % X_PIECES;
#pragma unroll
    for (int i = 0; i < C::X_STAGE / GROUP_THREADS; ++i) {
        const int r = thread / X_PIECES + GROUP_THREADS / X_PIECES * i;
        // Beyond the last row a column of B stays what it is: it reaches no other column's sums.
        if (first + r >= p.m) continue;
        const uint16_t* const from = p.x + (first + r) * p.stride + block * COLUMNS + c * 8;
        cp_async(stage + r * X_PIECES + (c ^ r % 8), reinterpret_cast<const uint4*>(from));
    }
}

// ---- Products

// A warp's sums: of 16 TILES_W rows of W with 8 TILES_X rows of x.
template <class C>
struct Sums {
    using T = typename C::T;
    float at[C::TILES_W][C::TILES_X][4] = {};

    __device__ void add(const uint4* stage, const uint2* scales, int first, int lane) {
        const int g = lane / 4, t = lane % 4;
        Affine affine[C::TILES_W][2] = {};
        if (C::GROUPED)
#pragma unroll
            for (int tile = 0; tile < C::TILES_W; ++tile)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    affine[tile][half] = Scales<C>::of(scales[16 * tile + 8 * half + g]);
        // Of matrices 0 ... 3 of a load of x: tile 0, columns 0 and 8; tile 1, columns 0 and 8.
        const uint4* const x = stage + (lane / 16 * 8 + lane % 8) * X_PIECES;
        const int piece = lane / 8 % 2 ^ lane % 8;
#pragma unroll 1
        for (int part = 0; part < C::PARTS; ++part) {
            // int8: words 0 ... 15 and then 16 ... 31 of planes 0 and 1, the same of planes 2 and 3.
            const int upper = C::BITS == 4 ? part : part / 2, words = C::BITS == 4 ? 0 : part % 2 * 4;
            uint32_t both[C::TILES_W][4];
#pragma unroll
            for (int tile = 0; tile < C::TILES_W; ++tile)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int r = first + 16 * tile + i % 2 * 8 + g;
                    const int c = words + i / 2 * 2 + t / 2;
                    const uint2 two =
                        reinterpret_cast<const uint2*>(stage + C::X_STAGE + place_of<C>(r, c))[t % 2];
                    both[tile][i] = prmt(two.x, two.y, upper ? 0x7632 : 0x5410);
                }
#pragma unroll
            for (int plane = 0; plane < C::PLANES; ++plane) {
                // Of 16 columns.
                const int step = C::BITS == 4 ? 4 * upper + plane : 2 * (2 * upper + plane) + part % 2;
                uint32_t b[C::TILES_X / 2][4];
#pragma unroll
                for (int pair = 0; pair < C::TILES_X / 2; ++pair)
                    ldmatrix_x4(b[pair], x + pair * 16 * X_PIECES + (piece ^ 2 * step));
#pragma unroll
                for (int tile = 0; tile < C::TILES_W; ++tile) {
                    uint32_t a[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        a[i] = value_pair<C>(both[tile][i], C::BITS * plane, affine[tile][i % 2]);
#pragma unroll
                    for (int i = 0; i < C::TILES_X; ++i)
                        mma_m16n8k16<T>(at[tile][i], a[0], a[1], a[2], a[3], b[i / 2][i % 2 * 2],
                                        b[i / 2][i % 2 * 2 + 1]);
                }
            }
        }
    }

    // As [row of x, row of W].
    __device__ void store(float* to, int first, int lane) const {
#pragma unroll
        for (int tile = 0; tile < C::TILES_W; ++tile)
#pragma unroll
            for (int x = 0; x < C::TILES_X; ++x)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    to[(8 * x + lane % 4 * 2 + i % 2) * C::STRIDE + first + 16 * tile + i / 2 * 8 + lane / 4] =
                        at[tile][x][i];
    }
};

// What follows the sums. A thread has four neighbouring columns of y, of every so many-th row.
template <class C, bool SWIGLU>
__device__ void write(const Product& p, const float* sums, int tile, int first_x) {
    using T = typename C::T;
    constexpr int OUTPUTS = SWIGLU ? C::ROWS / 2 : C::ROWS, QUADS = OUTPUTS / 4, ROWS_AT_ONCE = THREADS / QUADS;
    constexpr int HALVES = SWIGLU ? 2 : 1;  // gate and up
    const int width = SWIGLU ? p.n / 2 : p.n, r = threadIdx.x % QUADS * 4, column = tile * OUTPUTS + r;
    if (threadIdx.x / QUADS >= ROWS_AT_ONCE || column >= width) return;
    const bool whole = width % 4 == 0 && aligned(p.y, 8) && aligned(p.residual, 8);
    const float* const from = sums + (SWIGLU ? r / 8 * 16 + r % 8 : r);
    float scale[HALVES][4], bias[HALVES][4];
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = (column + i < width ? column + i : width - 1) + half * width;
            scale[half][i] = C::GROUPED ? 1 : widen<T>(p.scales[row]);
            bias[half][i] = p.bias ? widen<T>(p.bias[row]) : 0;
        }
    for (int x = threadIdx.x / QUADS; x < C::XS && first_x + x < p.m; x += ROWS_AT_ONCE) {
        float value[HALVES][4];
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
            const float* const even = from + x * C::STRIDE + 8 * half;
            const float* const odd = even + C::XS * C::STRIDE;
#pragma unroll
            for (int i = 0; i < 4; ++i) value[half][i] = (even[i] + odd[i]) * scale[half][i] + bias[half][i];
        }
        const int64_t place = int64_t(first_x + x) * width + column;
        uint16_t residual[4] = {}, y[4];
        if (p.residual) {
            if (whole) {
                const uint2 both = *reinterpret_cast<const uint2*>(p.residual + place);
                residual[0] = uint16_t(both.x), residual[1] = uint16_t(both.x >> 16);
                residual[2] = uint16_t(both.y), residual[3] = uint16_t(both.y >> 16);
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (column + i < width) residual[i] = p.residual[place + i];
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float result = SWIGLU ? silu(value[0][i]) * value[HALVES - 1][i] : value[0][i];
            if (p.residual) result += widen<T>(residual[i]);
            y[i] = narrow<T>(result);
        }
        if (whole) {
            *reinterpret_cast<uint2*>(p.y + place) =
                make_uint2(uint32_t(y[1]) << 16 | y[0], uint32_t(y[3]) << 16 | y[2]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (column + i < width) p.y[place + i] = y[i];
        }
    }
}

// ---- The kernel

template <class C>
__global__ void __launch_bounds__(THREADS, 1) quantized_gemm(const Product p) {
    uint4* const shared = reinterpret_cast<uint4*>(dynamic_shared());
    const int group = threadIdx.x / GROUP_THREADS, thread = threadIdx.x % GROUP_THREADS, lane = threadIdx.x % 32;
    const int first = thread / 32 * C::WARP_ROWS, first_x = blockIdx.x * C::XS, tile = blockIdx.y;
    const int blocks = p.k / COLUMNS;
    uint4* const queue = shared + group * C::STAGES * C::STAGE;
    uint2* const own_scales = reinterpret_cast<uint2*>(shared + C::QUEUE) + group * C::ROWS + first;

    // Weights are asked for before the last kernel's results are there.
    Scales<C> scales;
    if (C::GROUPED) scales.load(p, tile, first, lane, group);
#pragma unroll 1
    for (int stage = 0; stage < C::STAGES - 1; ++stage)
        if (group + GROUPS * stage < blocks)
            request_words<C>(p, tile, first, lane, group + GROUPS * stage, queue + stage * C::STAGE);
    pdl_launch_dependents();
    pdl_wait();
#pragma unroll 1
    for (int stage = 0; stage < C::STAGES - 1; ++stage) {
        if (group + GROUPS * stage < blocks)
            request_x<C>(p, first_x, thread, group + GROUPS * stage, queue + stage * C::STAGE);
        cp_async_commit_group();
    }

    Sums<C> sums;
    int stage = 0, ahead = C::STAGES - 1;
#pragma unroll 1
    for (int block = group; block < blocks; block += GROUPS) {
        cp_async_wait_group<C::STAGES - 2>();
        if (C::GROUPED) scales.store(own_scales, lane);
        // This block is there, and all have done with the one before, whose stage is free.
        barrier<GROUP_THREADS>(1 + group);
        const int later = block + GROUPS * (C::STAGES - 1);
        if (later < blocks) {
            uint4* const to = queue + ahead * C::STAGE;
            request_words<C>(p, tile, first, lane, later, to);
            request_x<C>(p, first_x, thread, later, to);
        }
        cp_async_commit_group();
        if (C::GROUPED) scales.load(p, tile, first, lane, block + GROUPS);
        sums.add(queue + stage * C::STAGE, own_scales, first, lane);
        stage = stage + 1 == C::STAGES ? 0 : stage + 1;
        ahead = ahead + 1 == C::STAGES ? 0 : ahead + 1;
        if (C::GROUPED) sync_warp();
    }
    // The sums take the place of the queues.
    cp_async_wait_group<0>();
    __syncthreads();
    float* const all = reinterpret_cast<float*>(shared);
    sums.store(all + group * C::XS * C::STRIDE, first, lane);
    __syncthreads();
    if (p.swiglu)
        write<C, true>(p, all, tile, first_x);
    else
        write<C, false>(p, all, tile, first_x);
}

// ---- Which configuration

template <class C>
bool fits() { return C::SHARED <= current_device().shared; }

template <class C>
int launch(const Product& p, cudaStream_t stream) {
    if (!fits<C>()) return INVALID;
    const int outputs = p.swiglu ? C::ROWS / 2 : C::ROWS, width = p.swiglu ? p.n / 2 : p.n;
    // Neighbours read the same weights.
    const dim3 grid((p.m + C::XS - 1) / C::XS, (width + outputs - 1) / outputs);
    return start<quantized_gemm<C>>(grid, THREADS, C::SHARED, stream, p);
}

// The configurations of a weight, by number.
template <class T, int BITS, bool GROUPED>
struct Table {
    static constexpr int DEEP = BITS == 4 ? 3 : 2;
    //                                     TILES_W TILES_X STAGES
    using V1 = Config<T, BITS, GROUPED, 1, 2, 2>;
    using V2 = Config<T, BITS, GROUPED, 1, 8, 2>;  // little shared memory
    using V3 = Config<T, BITS, GROUPED, 2, 8, 2>;
    using V4 = Config<T, BITS, GROUPED, 2, 8, 3>;
    using V5 = Config<T, BITS, GROUPED, 3, 8, DEEP>;
    using V6 = Config<T, BITS, GROUPED, 4, 8, DEEP>;
    using V7 = Config<T, BITS, GROUPED, 2, 16, 2>;  // only measured, in bfloat16
};
constexpr int VARIANTS = 8;

// That which takes least time of the multiprocessor with the most tiles, as large tiles take somewhat less for each row.
template <class T, int BITS, bool GROUPED>
int choose(const Product& p) {
    using Own = Table<T, BITS, GROUPED>;
    const Device& device = current_device();
    if (p.m <= 16) return 1;
    int best = 0;
    float least = 0;
    const auto consider = [&](auto config, int variant, float each) {
        using C = decltype(config);
        if (!fits<C>()) return;
        const int tiles = ((p.n + C::ROWS - 1) / C::ROWS) * ((p.m + C::XS - 1) / C::XS);
        const float time = float((tiles + device.multiprocessors - 1) / device.multiprocessors) * C::ROWS * each;
        if (!best || time < least) best = variant, least = time;
    };
    consider(typename Own::V6(), 6, 1);
    consider(typename Own::V5(), 5, 1.05f);
    consider(typename Own::V4(), 4, 1.15f);
    consider(typename Own::V3(), 3, 1.2f);
    consider(typename Own::V2(), 2, 1.6f);
    return best;
}

template <class T, int BITS, bool GROUPED>
int launch(const Product& p, int variant, cudaStream_t stream) {
    using Own = Table<T, BITS, GROUPED>;
    switch (variant > 0 ? variant : choose<T, BITS, GROUPED>(p)) {
        case 1: return launch<typename Own::V1>(p, stream);
        case 2: return launch<typename Own::V2>(p, stream);
        case 3: return launch<typename Own::V3>(p, stream);
        case 4: return launch<typename Own::V4>(p, stream);
        case 5: return launch<typename Own::V5>(p, stream);
        case 6: return launch<typename Own::V6>(p, stream);
    }
    if constexpr (std::is_same_v<T, Bfloat16>)
        if (variant == 7) return launch<typename Own::V7>(p, stream);
    return INVALID;
}

template <class T>
int launch(const Product& p, int bits, bool grouped, int variant, cudaStream_t stream) {
    if (bits == 4) return launch<T, 4, true>(p, variant, stream);
    return grouped ? launch<T, 8, true>(p, variant, stream) : launch<T, 8, false>(p, variant, stream);
}

}  // namespace

extern "C" int mimo_fast_gemm_variants() { return VARIANTS; }

// Arguments as of `mimo_fast_quantized_mma`; x, its rows and words are aligned to 16 bytes. variant: 0, or one of
// `mimo_fast_gemm_variants`. Returns a cudaError_t.
extern "C" int mimo_fast_quantized_gemm(const void* x, const void* words, const void* scales, const void* zeros,
                                        const void* bias, const void* residual, void* y, int64_t stride, int m, int n,
                                        int k, int bits, int grouped, int swiglu, int half, int variant,
                                        cudaStream_t stream) {
    const Product product{as16(x), static_cast<const uint4*>(words), as16(scales), as16(zeros), as16(bias),
                          as16(residual), static_cast<uint16_t*>(y), stride, m, n, k, swiglu};
    if (!aligned(x, 16) || !aligned(words, 16) || !aligned(scales, 2) || stride % 8) return INVALID;
    if (m < 1 || n < 1 || k < COLUMNS || k % COLUMNS || (bits == 4 && !grouped) || (swiglu && n % 2)) return INVALID;
    return half ? launch<Float16>(product, bits, grouped, variant, stream)
                : launch<Bfloat16>(product, bits, grouped, variant, stream);
}
