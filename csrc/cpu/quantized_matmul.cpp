// y = x W^T + b for few rows of x: the weights stream through once, by integer arithmetic of AVX2.
//
// x in fixed point. Each block of x becomes x = s (256 h + l) with bytes h and l and a float s, so that the block's
// largest value is 127 * 256 s: an error of 2^-16 of that value, where bfloat16 has 2^-9 of each. Its products with q
// are then exact integers, summed over a block, and only blocks are added in float:
//
//     y[n] = sum over blocks   scale s (sum q x)  -  sum over groups   scale (offset + zero) t,      t = sum of s x
//
//     4 bits    q h and q l by vpmaddubsw: 32 products an instruction. A lane gets at most 4 sums of two products,
//               4 * 2 * 15 * 128 = 15,360, which 16 bits hold.
//     8 bits    q and x as 16 bits by vpmaddwd: 16 products an instruction. A lane gets at most 8 sums of two products,
//               8 * 2 * 255 * 32,512 < 2^31.
//
// That is 31 instructions for the 128 weights of 64 bytes at 4 bits, 24 for those of 128 bytes at 8 bits; converting
// each weight to float and multiplying it there takes three times as many at 4 bits.
//
// x is permuted within each block to meet the weights as they are unpacked: bytes in order, low nibbles before high
// ones. A thread takes tiles of ROWS rows of W, so that a tile stays in its caches while many rows of x pass, two at a
// time: four rows of x would leave no room for W in a first cache of 32 KB.

#include "quantized_matmul.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace mimo_fast {
namespace {

constexpr int64_t ROWS = 16;
constexpr float LARGEST = 127 * 256;
// Bytes of W below which waking the other threads costs more than they bring.
constexpr int64_t SHARED = 1 << 17;

// Column of a block that meets byte or nibble i of its weights, in the order in which they are unpacked.
std::vector<int> unpacking_order(int bits, int block) {
    std::vector<int> order(block);
    const int planes = 32 / bits, words = block / planes;
    for (int column = 0; column < block; ++column) {
        const int word = column % words, plane = column / words;
        if (bits == 8) {
            order[4 * word + plane] = column;
        } else {
            const int byte = 4 * word + plane / 2;
            order[byte / 32 * 64 + plane % 2 * 32 + byte % 32] = column;
        }
    }
    return order;
}

// All rows of x in fixed point.
struct FixedPoint {
    std::vector<int8_t> high, low;  // [M, K], for 4 bits
    std::vector<int16_t> whole;     // [M, K], for 8 bits
    std::vector<float> steps;       // [M, K / block]: s
    std::vector<float> sums;        // [M, K / group]: t

    explicit FixedPoint(const QuantizedMatmul& p)
        : high(p.bits == 4 ? p.M * p.K : 0), low(high.size()), whole(p.bits == 8 ? p.M * p.K : 0),
          steps(p.M * (p.K / p.block)), sums(p.M * (p.K / p.group)) {
        const std::vector<int> order = unpacking_order(p.bits, p.block);
#pragma omp parallel for if (p.M > 4)
        for (int64_t m = 0; m < p.M; ++m) convert_row(p, order, m);
    }

    AVX2 void convert_row(const QuantizedMatmul& p, const std::vector<int>& order, int64_t m) {
        float scale = 1;
        if (p.norm) {
            __m256 squares = _mm256_setzero_ps();
            for (int64_t k = 0; k < p.K; k += 8) {
                const __m256 x = read8(p.x, p.type, m * p.K + k);
                squares = _mm256_fmadd_ps(x, x, squares);
            }
            scale = 1 / std::sqrt(sum8(squares) / float(p.K) + p.eps);
        }
        for (int64_t start = 0; start < p.K; start += p.block) {
            alignas(32) float x[128];
            __m256 largest = _mm256_setzero_ps();
            for (int i = 0; i < p.block; i += 8) {
                __m256 values = read8(p.x, p.type, m * p.K + start + i);
                if (p.norm)
                    values = _mm256_mul_ps(_mm256_mul_ps(values, _mm256_set1_ps(scale)),
                                           read8(p.norm, p.type, start + i));
                largest = _mm256_max_ps(largest, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), values));
                _mm256_store_ps(x + i, values);
            }
            convert_block(p, order, m, start, x, max8(largest));
        }
    }

    AVX2 void convert_block(
        const QuantizedMatmul& p, const std::vector<int>& order, int64_t m, int64_t start, const float* x,
        float largest
    ) {
        // What is not finite must not pass as a number; a maximum may not see NaN, a sum does.
        float check = 0;
        for (int i = 0; i < p.block; ++i) check += x[i] * 0;
        const float step = check == 0 ? largest / LARGEST : NAN;
        // What is too small for a normal step counts as zero.
        const float inverse = step >= std::numeric_limits<float>::min() ? 1 / step : 0;
        alignas(32) int32_t fixed[128];
        __m256i total = _mm256_setzero_si256();
        for (int i = 0; i < p.block; i += 8) {
            __m256 values = _mm256_mul_ps(_mm256_load_ps(x + i), _mm256_set1_ps(inverse));
            values = _mm256_max_ps(_mm256_min_ps(values, _mm256_set1_ps(LARGEST)), _mm256_set1_ps(-LARGEST));
            const __m256i whole8 = inverse ? _mm256_cvtps_epi32(values) : _mm256_setzero_si256();
            total = _mm256_add_epi32(total, whole8);
            _mm256_store_si256(reinterpret_cast<__m256i*>(fixed + i), whole8);
        }
        const int64_t at = m * p.K + start;
        if (p.bits == 8) {
            for (int i = 0; i < p.block; ++i) whole[at + i] = int16_t(fixed[order[i]]);
        } else {
            for (int i = 0; i < p.block; ++i) {
                const int32_t value = fixed[order[i]], h = (value + 128) >> 8;
                high[at + i] = int8_t(h);
                low[at + i] = int8_t(value - 256 * h);
            }
        }
        steps[m * (p.K / p.block) + start / p.block] = step;
        sums[m * (p.K / p.group) + start / p.group] += step * sum8(_mm256_cvtepi32_ps(total));
    }
};

AVX2_INLINE __m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

// Sums of q x over one block of W, 8 lanes, for each of R rows of x; `at` is the block's place in a row of x.
template <int BLOCK, int R>
AVX2_INLINE void dot_4_bits(const uint8_t* words, const FixedPoint& x, int64_t K, int64_t at, __m256i (&out)[R]) {
    constexpr int V = BLOCK / 64;
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i q[2 * V];
    for (int v = 0; v < V; ++v) {
        const __m256i bytes = load(words + 32 * v);
        q[2 * v] = _mm256_and_si256(bytes, nibble);
        q[2 * v + 1] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
    }
    for (int r = 0; r < R; ++r) {
        const int8_t *high = &x.high[r * K + at], *low = &x.low[r * K + at];
        __m256i h = _mm256_maddubs_epi16(q[0], load(high)), l = _mm256_maddubs_epi16(q[0], load(low));
        for (int i = 1; i < 2 * V; ++i) {
            h = _mm256_add_epi16(h, _mm256_maddubs_epi16(q[i], load(high + 32 * i)));
            l = _mm256_add_epi16(l, _mm256_maddubs_epi16(q[i], load(low + 32 * i)));
        }
        out[r] = _mm256_add_epi32(_mm256_slli_epi32(_mm256_madd_epi16(h, ones), 8), _mm256_madd_epi16(l, ones));
    }
}

template <int BLOCK, int R>
AVX2_INLINE void dot_8_bits(const uint8_t* words, const FixedPoint& x, int64_t K, int64_t at, __m256i (&out)[R]) {
    constexpr int V = BLOCK / 16;
    __m256i q[V];
    for (int v = 0; v < V; ++v)
        q[v] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words + 16 * v)));
    for (int r = 0; r < R; ++r) {
        const int16_t* whole = &x.whole[r * K + at];
        __m256i sum = _mm256_madd_epi16(q[0], load(whole));
        for (int v = 1; v < V; ++v) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(q[v], load(whole + 16 * v)));
        out[r] = sum;
    }
}

// Subtracts sum of scale (offset + zero) t over the groups of row n from each of R results.
template <int R>
AVX2_INLINE void subtract_zeros(const QuantizedMatmul& p, int64_t n, const float* sums, float (&y)[R]) {
    const int64_t groups = p.K / p.group;
    const uint16_t *scales = p.scales + n * groups, *zeros = p.zeros ? p.zeros + n * groups : nullptr;
    const float offset = float(1 << (p.bits - 1));
    __m256 wide[R];
    for (int r = 0; r < R; ++r) wide[r] = _mm256_setzero_ps();
    int64_t g = 0;
    for (; g + 8 <= groups; g += 8) {
        const __m256 scale = widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + g)));
        __m256 zero = _mm256_set1_ps(offset);
        if (zeros)
            zero = _mm256_add_ps(zero, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros + g))));
        const __m256 product = _mm256_mul_ps(scale, zero);
        for (int r = 0; r < R; ++r) wide[r] = _mm256_fmadd_ps(product, _mm256_loadu_ps(sums + r * groups + g), wide[r]);
    }
    for (int r = 0; r < R; ++r) y[r] -= sum8(wide[r]);
    for (; g < groups; ++g) {
        const float product = from_bfloat16(scales[g]) * (offset + (zeros ? _cvtsh_ss(zeros[g]) : 0));
        for (int r = 0; r < R; ++r) y[r] -= product * sums[r * groups + g];
    }
}

// Row n of W with rows m ... m + R - 1 of x, and the bias.
template <int BITS, int BLOCK, int R>
AVX2_INLINE void dot_row(const QuantizedMatmul& p, const FixedPoint& x, int64_t m, int64_t n, float (&y)[R]) {
    const int64_t blocks = p.K / BLOCK, groups = p.K / p.group, blocks_of_group = p.group / BLOCK;
    const uint8_t* words = p.words + n * (p.K * BITS / 8);
    const uint16_t* scales = p.scales + n * groups;
    const float* steps = &x.steps[m * blocks];
    __m256 sum[R];
    for (int r = 0; r < R; ++r) sum[r] = _mm256_setzero_ps();
    for (int64_t g = 0, b = 0; g < groups; ++g) {
        const float scale = from_bfloat16(scales[g]);
        for (int64_t end = b + blocks_of_group; b < end; ++b, words += BLOCK * BITS / 8) {
            __m256i dots[R];
            if constexpr (BITS == 4) dot_4_bits<BLOCK, R>(words, x, p.K, m * p.K + b * BLOCK, dots);
            else dot_8_bits<BLOCK, R>(words, x, p.K, m * p.K + b * BLOCK, dots);
            for (int r = 0; r < R; ++r) {
                const __m256 factor = _mm256_set1_ps(scale * steps[r * blocks + b]);
                sum[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r]), factor, sum[r]);
            }
        }
    }
    for (int r = 0; r < R; ++r) y[r] = sum8(sum[r]) + (p.bias ? read(p.bias, p.type, n) : 0);
    subtract_zeros<R>(p, n, &x.sums[m * groups], y);
}

// Outputs first ... last - 1 of rows m ... m + R - 1.
template <int BITS, int BLOCK, int R>
AVX2 void dot_rows(const QuantizedMatmul& p, const FixedPoint& x, int64_t m, int64_t first, int64_t last) {
    const int64_t outputs = p.swiglu ? p.N / 2 : p.N;
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
    const int64_t outputs = p.swiglu ? p.N / 2 : p.N, tiles = (outputs + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(static) if (p.N * p.K * BITS / 8 * std::min<int64_t>(p.M, 8) > SHARED)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = tile * ROWS, last = std::min(first + ROWS, outputs);
        int64_t m = 0;
        for (; m + 2 <= p.M; m += 2) dot_rows<BITS, BLOCK, 2>(p, x, m, first, last);
        if (p.M > m) dot_rows<BITS, BLOCK, 1>(p, x, m, first, last);
    }
}

}  // namespace

void quantized_matmul(const QuantizedMatmul& p) {
    if (p.bits == 4) p.block == 128 ? run<4, 128>(p) : run<4, 64>(p);
    else if (p.block == 128) run<8, 128>(p);
    else p.block == 64 ? run<8, 64>(p) : run<8, 32>(p);
}

}  // namespace mimo_fast
