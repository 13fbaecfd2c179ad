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
// ones. A thread takes tiles of ROWS rows of W, so that a tile stays in its caches while many rows of x pass.

#include "quantized_matmul.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <immintrin.h>
#include <limits>
#include <vector>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE AVX2 inline __attribute__((always_inline))

namespace mimo_fast {
namespace {

constexpr int64_t ROWS = 16;
constexpr float LARGEST = 127 * 256;
// Bytes of W below which waking the other threads costs more than they bring.
constexpr int64_t SHARED = 1 << 17;

inline float from_bfloat16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) return 0x7FC0;
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float read(const void* values, Type type, int64_t i) {
    return type == Type::float32 ? static_cast<const float*>(values)[i]
                                 : from_bfloat16(static_cast<const uint16_t*>(values)[i]);
}

inline void write(void* values, Type type, int64_t i, float value) {
    if (type == Type::float32) static_cast<float*>(values)[i] = value;
    else static_cast<uint16_t*>(values)[i] = to_bfloat16(value);
}

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
        for (int64_t m = 0; m < p.M; ++m)
            for (int64_t start = 0; start < p.K; start += p.block) convert(p, order, m, start);
    }

    void convert(const QuantizedMatmul& p, const std::vector<int>& order, int64_t m, int64_t start) {
        float x[128], largest = 0;
        for (int i = 0; i < p.block; ++i) x[i] = read(p.x, p.type, m * p.K + start + i);
        for (int i = 0; i < p.block; ++i) largest = std::max(largest, std::fabs(x[i]));
        bool finite = true;
        for (int i = 0; i < p.block; ++i) finite &= std::isfinite(x[i]);
        // What is not finite must not pass as a number.
        const float step = finite ? largest / LARGEST : NAN;
        // What is too small for a normal step counts as zero.
        const float inverse = step >= std::numeric_limits<float>::min() ? 1 / step : 0;
        int32_t fixed[128], sum = 0;
        for (int i = 0; i < p.block; ++i) {
            fixed[i] = inverse ? int32_t(std::lrint(std::clamp(x[i] * inverse, -LARGEST, LARGEST))) : 0;
            sum += fixed[i];
        }
        const int64_t at = m * p.K + start;
        for (int i = 0; i < p.block; ++i) {
            const int32_t value = fixed[order[i]];
            if (p.bits == 8) {
                whole[at + i] = int16_t(value);
            } else {
                const int32_t h = (value + 128) >> 8;
                high[at + i] = int8_t(h);
                low[at + i] = int8_t(value - 256 * h);
            }
        }
        steps[m * (p.K / p.block) + start / p.block] = step;
        sums[m * (p.K / p.group) + start / p.group] += step * float(sum);
    }
};

AVX2_INLINE float horizontal_sum(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

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
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + g));
        const __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
        __m256 zero = _mm256_set1_ps(offset);
        if (zeros)
            zero = _mm256_add_ps(zero, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros + g))));
        const __m256 product = _mm256_mul_ps(scale, zero);
        for (int r = 0; r < R; ++r) wide[r] = _mm256_fmadd_ps(product, _mm256_loadu_ps(sums + r * groups + g), wide[r]);
    }
    for (int r = 0; r < R; ++r) y[r] -= horizontal_sum(wide[r]);
    for (; g < groups; ++g) {
        const float product = from_bfloat16(scales[g]) * (offset + (zeros ? _cvtsh_ss(zeros[g]) : 0));
        for (int r = 0; r < R; ++r) y[r] -= product * sums[r * groups + g];
    }
}

// Row n of W with rows m ... m + R - 1 of x.
template <int BITS, int BLOCK, int R>
AVX2_INLINE void dot_row(const QuantizedMatmul& p, const FixedPoint& x, int64_t m, int64_t n) {
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
    float y[R];
    for (int r = 0; r < R; ++r) y[r] = horizontal_sum(sum[r]);
    subtract_zeros<R>(p, n, &x.sums[m * groups], y);
    for (int r = 0; r < R; ++r) {
        const float bias = p.bias ? read(p.bias, p.type, n) : 0;
        write(p.y, p.type, (m + r) * p.N + n, y[r] + bias);
    }
}

template <int BITS, int BLOCK, int R>
AVX2 void dot_rows(const QuantizedMatmul& p, const FixedPoint& x, int64_t m, int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) dot_row<BITS, BLOCK, R>(p, x, m, n);
}

template <int BITS, int BLOCK>
void run(const QuantizedMatmul& p) {
    const FixedPoint x(p);
    const int64_t tiles = (p.N + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(static) if (p.N * p.K * BITS / 8 * std::min<int64_t>(p.M, 4) > SHARED)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = tile * ROWS, last = std::min(first + ROWS, p.N);
        int64_t m = 0;
        for (; m + 4 <= p.M; m += 4) dot_rows<BITS, BLOCK, 4>(p, x, m, first, last);
        if (p.M - m >= 2) dot_rows<BITS, BLOCK, 2>(p, x, m, first, last), m += 2;
        if (p.M - m >= 1) dot_rows<BITS, BLOCK, 1>(p, x, m, first, last);
    }
}

}  // namespace

bool quantized_matmul_runs() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

void quantized_matmul(const QuantizedMatmul& p) {
    if (p.bits == 4) p.block == 128 ? run<4, 128>(p) : run<4, 64>(p);
    else if (p.block == 128) run<8, 128>(p);
    else p.block == 64 ? run<8, 64>(p) : run<8, 32>(p);
}

}  // namespace mimo_fast
