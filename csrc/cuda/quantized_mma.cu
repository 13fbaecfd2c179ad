// Products of few rows with int4 or int8 weights on tensor cores; bfloat16 in and out, sums in float32.
//
//   y [M, N] = epilogues(norm(x) W^T + b)          formulas: mimo_fast/kernels/qmatmul.py
//                                                  layout of W: mimo_fast/kernels/quantized_weight.py
//
// Such a product is bound by the bytes of W as long as little is done for each of them. So the weight is the operand
// with 16 rows (A) and x the one with 8 columns (B): up to 8 rows of x cost what one does. Nothing moves between
// threads: what a product sums over may be in any order, if only A and B agree, so a thread multiplies the very words
// that it loaded.
//
//   block of 128 columns, int4: 16 words a row          thread t of four that share row g
//     words 4 t ... 4 t + 3, 16 bytes                    word i: columns 16 p + 4 t + i of the planes p = 0 ... 7
//     (word >> 4 p) & 0x000f000f                         planes p and p + 4 of it, two halves of a register
//     ... | 0x43004300                                   as bfloat16 128 + q: no conversion, one instruction a pair
//
// Of an int8 the two halves of each byte go the same way, 128 + low and 128 + high, into sums of their own. The 128s,
// and the zeros of int4, leave again once a block: sum (128 + q) x - (128 + zero) sum x. Sum x comes from the tensor
// cores too, as another row block of A that is all ones; and so do the squares of a norm, as the diagonal of x x^T.
//
//   block of threads          16 TILES rows of W, whose tiles of A share B
//     warp                    every WARPS-th block of columns; the words of DEPTH of them are on their way
//     then, in shared memory  the warps' sums added in order; norm, bias, SwiGLU, residual; y
//
// With a norm, x is multiplied by its weight as it is read; the row's scale comes last. A row's sums are in one order
// whatever rows come with it. There are no atomics. Weights do not depend on what ran before: where the GPU lets a
// kernel begin before the last one has ended (sm_90 on), the first words are asked for by then.

#include <warp.cuh>

namespace {

constexpr int COLUMNS = 128;
constexpr int TILE = 16;

constexpr uint32_t HALVES = 0x000f000f;
constexpr uint32_t MAGIC = 0x43004300;
constexpr uint32_t ONES = 0x3f803f80;
constexpr float OFFSET_INT4 = 128 + 8;
constexpr float OFFSET_INT8 = 128 + 16 * 128 + 128;

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
    int grouped, swiglu;
    float eps;
};

// Row r of a block of ROWS as a row of W: half of them gate and half up where a result takes one of each.
template <int ROWS>
__device__ inline int weight_row(const Product& p, int r) {
    if (!p.swiglu) return blockIdx.y * ROWS + r;
    return r / (ROWS / 2) * (p.n / 2) + blockIdx.y * (ROWS / 2) + r % (ROWS / 2);
}

// What a thread reads of a block of columns: of rows g and g + 8 of each tile.
template <int BITS, int TILES>
struct Words {
    uint4 part[TILES][2][BITS / 4];
    uint16_t scale[TILES][2], zero[TILES][2];

    __device__ void load(const Product& p, const int (&rows)[TILES][2], int block, int t) {
        const int blocks = p.k / COLUMNS;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int64_t place = int64_t(rows[tile][half]) * blocks + block;
#pragma unroll
                for (int i = 0; i < BITS / 4; ++i)
                    part[tile][half][i] = load_once(p.words + place * BITS + 4 * i + t);
                if (p.grouped) scale[tile][half] = p.scales[place];
                if (BITS == 4 && p.zeros) zero[tile][half] = p.zeros[place];
            }
    }
};

__device__ inline uint32_t word(const uint4& words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

__device__ inline uint32_t pair(uint32_t word, int shift) { return ((word >> shift) & HALVES) | MAGIC; }

// Four columns of x in each plane, 8 bytes.
template <int PLANES>
struct Quads {
    uint2 plane[PLANES];

    // The columns of word i in planes p and p + PLANES / 2, as halves of a register.
    __device__ uint32_t pair(int i, int p) const {
        const uint2 &low = plane[p], &high = plane[p + PLANES / 2];
        return i < 2 ? pick_bytes(low.x, high.x, i % 2 ? 0x7632 : 0x5410)
                     : pick_bytes(low.y, high.y, i % 2 ? 0x7632 : 0x5410);
    }
};

// A thread's part of all sums. Of its row g of x times every row of x: squares[x][g % 2] is its square where t = g / 2.
template <int BITS, int TILES, int TILES_X, bool NORM>
struct Sums {
    static constexpr int PLANES = 32 / BITS;

    float total[TILES][TILES_X][4] = {};
    float squares[TILES_X][4] = {};

    __device__ void add(const Product& p, const Words<BITS, TILES>& words, int block, int g, int t) {
#pragma unroll
        for (int x = 0; x < TILES_X; ++x) {
            float low[TILES][4] = {}, high[TILES][4] = {}, plain[4] = {};
            const int m = (blockIdx.x * TILES_X + x) * 8 + g;
            multiply(p, words, m, block * COLUMNS + 4 * t, squares[x], low, high, plain);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float sum = BITS == 4 ? low[tile][i] : low[tile][i] + 16 * high[tile][i];
                    float offset = BITS == 4 ? OFFSET_INT4 : OFFSET_INT8;
                    if (BITS == 4 && p.zeros) offset += from_half(words.zero[tile][i / 2]);
                    const float scale = p.grouped ? from_bfloat16(words.scale[tile][i / 2]) : 1;
                    total[tile][x][i] += scale * (sum - offset * plain[i]);
                }
        }
    }

    // Sums over one block of columns: of 128 + q or, of int8, of 128 + low and 128 + high; and of x alone.
    __device__ static void multiply(const Product& p, const Words<BITS, TILES>& words, int m, int first,
                                    float (&squares)[4], float (&low)[TILES][4], float (&high)[TILES][4],
                                    float (&plain)[4]) {
#pragma unroll
        for (int part = 0; part < BITS / 4; ++part) {
            const auto x = load_x(p, m, first + 16 * part, squares);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int s = 0; s < PLANES / 2; s += 2) {
                    const uint32_t b0 = x.pair(i, s), b1 = x.pair(i, s + 1);
#pragma unroll
                    for (int tile = 0; tile < TILES; ++tile) {
                        const uint32_t upper = word(words.part[tile][0][part], i);
                        const uint32_t lower = word(words.part[tile][1][part], i);
                        const int a = BITS * s, b = BITS * (s + 1);
                        multiply_add(low[tile], pair(upper, a), pair(lower, a), pair(upper, b), pair(lower, b), b0, b1);
                        if (BITS == 8)
                            multiply_add(high[tile], pair(upper, a + 4), pair(lower, a + 4), pair(upper, b + 4),
                                         pair(lower, b + 4), b0, b1);
                    }
                    multiply_add(plain, ONES, ONES, ONES, ONES, b0, b1);
                }
        }
    }

    // Columns `first`, ... of each plane of row m of x, times the norm's weight.
    __device__ static Quads<PLANES> load_x(const Product& p, int m, int first, float (&squares)[4]) {
        constexpr int STEP = COLUMNS / PLANES;
        Quads<PLANES> got;
        const uint16_t* from = p.x + m * p.stride + first;
#pragma unroll
        for (int i = 0; i < PLANES; ++i)
            got.plane[i] = m < p.m ? *reinterpret_cast<const uint2*>(from + i * STEP) : make_uint2(0, 0);
        if (NORM) {
#pragma unroll
            for (int i = 0; i < PLANES; ++i) {
                uint2& x = got.plane[i];
                multiply_add(squares, x.x, 0, x.y, 0, x.x, x.y);
                const uint2 weight = *reinterpret_cast<const uint2*>(p.norm + first + i * STEP);
                x = make_uint2(multiply_pairs(x.x, weight.x), multiply_pairs(x.y, weight.y));
            }
        }
        return got;
    }
};

__device__ inline float silu(float value) { return value / (1 + expf(-value)); }

template <int BITS, int TILES, int TILES_X, bool NORM, int WARPS, int DEPTH>
__global__ void __launch_bounds__(WARPS * 32) quantized_mma(const Product p) {
    constexpr int XS = 8 * TILES_X, ROWS = TILES * TILE;
    __shared__ float sums[WARPS][XS][ROWS + 1];
    __shared__ float squares[WARPS][XS];
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int blocks = p.k / COLUMNS;

    int rows[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = weight_row<ROWS>(p, tile * TILE + half * 8 + g);
            rows[tile][half] = row < p.n ? row : p.n - 1;
        }
    Words<BITS, TILES> words[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; ++i)
        if (warp + i * WARPS < blocks) words[i].load(p, rows, warp + i * WARPS, t);
    let_the_next_begin();
    wait_for_the_last();

    Sums<BITS, TILES, TILES_X, NORM> mine;
    for (int first = warp; first < blocks; first += WARPS * DEPTH) {
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            const int block = first + i * WARPS, ahead = block + WARPS * DEPTH;
            if (block >= blocks) break;
            const Words<BITS, TILES> now = words[i];
            if (ahead < blocks) words[i].load(p, rows, ahead, t);
            mine.add(p, now, block, g, t);
        }
    }

#pragma unroll
    for (int x = 0; x < TILES_X; ++x) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                sums[warp][8 * x + 2 * t + i % 2][tile * TILE + i / 2 * 8 + g] = mine.total[tile][x][i];
        if (NORM && t == g / 2) squares[warp][8 * x + g] = g % 2 ? mine.squares[x][1] : mine.squares[x][0];
    }
    __syncthreads();

    const int outputs = p.swiglu ? ROWS / 2 : ROWS, width = p.swiglu ? p.n / 2 : p.n;
    for (int i = threadIdx.x; i < XS * outputs; i += WARPS * 32) {
        const int x = i / outputs, r = i % outputs, m = blockIdx.x * XS + x, column = blockIdx.y * outputs + r;
        if (m >= p.m || column >= width) continue;
        float scale = 1;
        if (NORM) {
            float square = 0;
            for (int w = 0; w < WARPS; ++w) square += squares[w][x];
            scale = rsqrtf(square / p.k + p.eps);
        }
        const auto result = [&](int of) {
            const int row = weight_row<ROWS>(p, of);
            float sum = 0;
            for (int w = 0; w < WARPS; ++w) sum += sums[w][x][of];
            if (!p.grouped) sum *= from_bfloat16(p.scales[row]);
            return sum * scale + (p.bias ? from_bfloat16(p.bias[row]) : 0);
        };
        float value = p.swiglu ? silu(result(r)) * result(ROWS / 2 + r) : result(r);
        const int64_t place = int64_t(m) * width + column;
        if (p.residual) value += from_bfloat16(p.residual[place]);
        p.y[place] = to_bfloat16(value);
    }
}

template <int BITS, int TILES, int TILES_X, bool NORM, int WARPS, int DEPTH>
void launch(const Product& p, cudaStream_t stream) {
    constexpr int XS = 8 * TILES_X, ROWS = TILES * TILE;
    // Neighbours in the first dimension read the same weights.
    const dim3 grid((p.m + XS - 1) / XS, (p.n + ROWS - 1) / ROWS);
    start(quantized_mma<BITS, TILES, TILES_X, NORM, WARPS, DEPTH>, grid, WARPS * 32, stream, p);
}

template <int BITS, int TILES, int TILES_X, int WARPS, int DEPTH>
void launch(const Product& p, cudaStream_t stream) {
    p.norm ? launch<BITS, TILES, TILES_X, true, WARPS, DEPTH>(p, stream)
           : launch<BITS, TILES, TILES_X, false, WARPS, DEPTH>(p, stream);
}

template <int BITS>
void launch_some(const Product& p, cudaStream_t stream) {
    if constexpr (BITS == 4)
        launch<BITS, 2, 2, 8, 2>(p, stream);
    else
        p.norm ? launch<BITS, 1, 2, true, 8, 1>(p, stream) : launch<BITS, 2, 2, false, 8, 1>(p, stream);
}

// Rows of W that give every SM of a large card a block of threads with two tiles, and with one.
constexpr int MANY = 5120, SOME = 2048;

// Measured on an H100 (docs/LOG.md); two tiles of W, two of x, 16 warps or a norm are left out where they would spill.
// WARPS, and so the order of a sum, depends on the weight and its norm alone.
template <int BITS>
void launch(const Product& p, cudaStream_t stream) {
    constexpr bool four = BITS == 4;
    const bool few = p.m <= 8;
    if (p.n >= MANY)
        few ? launch<BITS, 2, 1, four ? 8 : 4, 1>(p, stream)
            : launch<BITS, four ? 2 : 1, 2, four ? 8 : 4, four ? 2 : 1>(p, stream);
    else if (p.n >= SOME || p.norm)
        few ? launch<BITS, 1, 1, 8, four ? 2 : 1>(p, stream) : launch_some<BITS>(p, stream);
    else if constexpr (four)
        few ? launch<BITS, 1, 1, false, 16, 2>(p, stream) : launch<BITS, 1, 2, false, 16, 1>(p, stream);
    else
        launch<BITS, 1, 1, false, 16, 1>(p, stream);
}

}  // namespace

// x [m, k], rows `stride` apart; words [n, k bits / 32]; scales [n, k / 128] if grouped, else [n]; zeros as scales, of
// float16; bias [n]; y and residual [m, n], or [m, n / 2] with swiglu; null for what there is not. k is a multiple of
// 128. Returns a cudaError_t.
extern "C" int mimo_fast_quantized_mma(
    const void* x, const void* norm, const void* words, const void* scales, const void* zeros, const void* bias,
    const void* residual, void* y, int64_t stride, int m, int n, int k, int bits, int grouped, int swiglu, float eps,
    cudaStream_t stream) {
    const auto as16 = [](const void* pointer) { return static_cast<const uint16_t*>(pointer); };
    const Product product{as16(x), as16(norm), static_cast<const uint4*>(words), as16(scales), as16(zeros), as16(bias),
                          as16(residual), static_cast<uint16_t*>(y), stride, m, n, k, grouped, swiglu, eps};
    bits == 4 ? launch<4>(product, stream) : launch<8>(product, stream);
    return last_error();
}
