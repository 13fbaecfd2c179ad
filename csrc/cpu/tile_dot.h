// Products of tiles: TILE_OUTPUTS rows of packed weights, one a lane, with up to TILE_ROWS rows of x in fixed point.
// Integers and the order of float sums are those of block_dot.h, so that results have the same bits.
//
//     pack_x<BITS, BLOCK>       a block of one row of x, in the order in which tiles read it
//     unpack<BITS, BLOCK>       a block of TILE_OUTPUTS rows of W
//     dot_sum<BLOCK, ROWS>      one of the SUMS sums of each row += scale * step * dot over some blocks
//     Lanes                     the floats of one register, for what is not integers
//
// A sum has SUMS float terms that are added last. What block_dot.h has in lane i of one register is here in the lanes of
// register i: of 4 bits, the products of the 32-bit words i and 8 + i of a block; of 8 bits, those of the 16-bit words
// i, 8 + i, .... A word of both operands, 4 bytes or 2 values of 16 bits, belongs to one sum; x is broadcast from memory.
#pragma once

#include "simd.h"

namespace mimo_fast::MIMO_FAST_SET {

constexpr int SUMS = 8;

// What dot_sum reads, of a tile of x and one of W.
struct TileScales {
    const float* scales;  // [blocks, TILE_OUTPUTS]
    const float* steps;   // of row r and block b at b `stride` + r
    int64_t stride;
    float* products;      // [blocks, TILE_ROWS, TILE_OUTPUTS], made with the first sum
};

#if defined(MIMO_FAST_AVX512) || defined(MIMO_FAST_AVX2)

INLINE __m256i load_ints(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
INLINE void store_ints(void* at, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(at), v); }

#endif

#if defined(MIMO_FAST_AVX512)

// Bytes, by vpdpbusd. Zen 4 does that and the multiplications of floats in the same two units: with the sum in float
// and its scale, 128 columns take 73 cycles of which 64 are vpdpbusd.

constexpr int TILE_ROWS = 8, TILE_OUTPUTS = 16;
constexpr int WORD_VALUES = 4;          // of a row in a word
constexpr int X_WORDS = 2;              // of x for each of W: high bytes and low bytes
constexpr int64_t TILE_COLUMNS = 1024;  // at once: x of 8 rows fills half of a first cache of 32 KB

struct Lanes {
    __m512 v;
};
constexpr int LANES = 16;
INLINE Lanes load_lanes(const float* at) { return {_mm512_load_ps(at)}; }
INLINE void store_lanes(float* at, Lanes a) { _mm512_storeu_ps(at, a.v); }
INLINE Lanes splat_lanes(float v) { return {_mm512_set1_ps(v)}; }
INLINE Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

// Words of one row of x, a block: [SUMS][high, low][BLOCK / 32].
template <int BITS, int BLOCK>
INLINE void pack_x(const int32_t* fixed, uint32_t* to) {
    constexpr int V = BLOCK / 32, WORDS = BLOCK * BITS / 32;
    const __m256i byte = _mm256_set1_epi32(255), second = _mm256_set1_epi32(0xFF00), half = _mm256_set1_epi32(128);
    const auto split = [&](int at, __m256i& high, __m256i& low) {  // high in its second byte
        const __m256i x = load_ints(fixed + at);
        high = _mm256_and_si256(_mm256_add_epi32(x, half), second);
        low = _mm256_and_si256(x, byte);
    };
    const auto shift = [](__m256i v, int by) { return _mm256_slli_epi32(v, by); };
    for (int v = 0; v < V; ++v) {
        __m256i high, low, h[4], l[4];
        if constexpr (BITS == 4) {
            for (int j = 0; j < 4; ++j) split((2 * j + v % 2) * WORDS + v / 2 * 8, h[j], l[j]);
            low = _mm256_or_si256(_mm256_or_si256(l[0], shift(l[1], 8)),
                                  _mm256_or_si256(shift(l[2], 16), shift(l[3], 24)));
            high = _mm256_or_si256(_mm256_or_si256(_mm256_srli_epi32(h[0], 8), h[1]),
                                   _mm256_or_si256(shift(h[2], 8), shift(h[3], 16)));
        } else {
            for (int j = 0; j < 4; ++j) split(j * WORDS + 8 * v, h[j], l[j]);
            // Two planes of eight words, in 16 bits; then words 0 ... 3 with 4 ... 7 in the upper halves.
            const auto lanes = [](__m256i a, __m256i b) {
                const auto folded = [](__m256i w) {
                    return _mm_or_si128(_mm256_castsi256_si128(w), _mm_slli_epi32(_mm256_extracti128_si256(w, 1), 16));
                };
                const __m128i even = folded(a), odd = folded(b);
                return _mm256_set_m128i(_mm_unpackhi_epi32(even, odd), _mm_unpacklo_epi32(even, odd));
            };
            low = lanes(_mm256_or_si256(l[0], shift(l[1], 8)), _mm256_or_si256(l[2], shift(l[3], 8)));
            high = lanes(_mm256_or_si256(_mm256_srli_epi32(h[0], 8), h[1]),
                         _mm256_or_si256(_mm256_srli_epi32(h[2], 8), h[3]));
        }
        uint32_t words[2][SUMS];
        store_ints(words[0], high);
        store_ints(words[1], low);
        for (int i = 0; i < SUMS; ++i)
            for (int part = 0; part < 2; ++part) to[(2 * i + part) * V + v] = words[part][i];
    }
}

// Registers i of eight words of 16 rows; row n + 8 is in the upper half of rows[n].
INLINE void transpose(__m512i (&rows)[8]) {
    __m512i pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);      // words 0, 1 (and 4, 5)
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);  // words 2, 3 (and 6, 7)
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);      // word 2 j (and 2 j + 4)
            fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);  // word 2 j + 1
        }
    const __m512i lower = _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0), upper = _mm512_set_epi64(15, 14, 7, 6, 11, 10, 3, 2);
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm512_permutex2var_epi64(fours[i], lower, fours[i + 4]);
        rows[i + 4] = _mm512_permutex2var_epi64(fours[i], upper, fours[i + 4]);
    }
}

// A block of rows of W, whose words are rows[n]: values to [SUMS], `stride` bytes apart, [BLOCK / 32][TILE_OUTPUTS][4].
template <int BITS, int BLOCK>
INLINE void unpack(const uint8_t* const (&rows)[TILE_OUTPUTS], int64_t at, uint8_t* to, int64_t stride) {
    constexpr int PLANES = BITS == 4 ? 2 : 1;
    for (int v = 0; v < BLOCK / 32; v += PLANES, at += 32) {
        __m512i words[8];
        for (int n = 0; n < 8; ++n)
            words[n] = _mm512_inserti64x4(_mm512_zextsi256_si512(load_ints(rows[n] + at)), load_ints(rows[n + 8] + at), 1);
        transpose(words);
        for (int i = 0; i < SUMS; ++i) {
            uint8_t* value = to + i * stride + 64 * v;
            if constexpr (BITS == 8) {
                // Half i % 2 of words i / 2 and 4 + i / 2.
                const __m512i first = words[i / 2], second = words[4 + i / 2];
                _mm512_store_si512(value, i % 2 ? _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(first, 16), second)
                                                : _mm512_mask_blend_epi16(0xAAAAAAAA, first, _mm512_slli_epi32(second, 16)));
            } else {
                const __m512i nibble = _mm512_set1_epi8(15);
                _mm512_store_si512(value, _mm512_and_si512(words[i], nibble));
                _mm512_store_si512(value + 64, _mm512_and_si512(_mm512_srli_epi16(words[i], 4), nibble));
            }
        }
    }
}

// A block's products with up to four rows: their shifts and conversions run beside the products of the next four.
template <int V, int ROWS>
INLINE void add_rows(const __m512i (&q)[V], const uint32_t* x, const float* products, __m512* totals) {
    __m512i dots[ROWS];
    for (int r = 0; r < ROWS; ++r) dots[r] = _mm512_setzero_si512();
    for (int part = 0; part < 2; ++part) {
        for (int v = 0; v < V; ++v)
            for (int r = 0; r < ROWS; ++r)
                dots[r] = _mm512_dpbusd_epi32(dots[r], q[v], _mm512_set1_epi32(int(x[(2 * r + part) * V + v])));
        for (int r = 0; r < ROWS && !part; ++r) dots[r] = _mm512_slli_epi32(dots[r], 8);
    }
    for (int r = 0; r < ROWS; ++r)
        totals[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r]), _mm512_load_ps(products + r * TILE_OUTPUTS), totals[r]);
}

// One sum of each of ROWS rows of x: w [blocks, BLOCK / 32, TILE_OUTPUTS, 4], x [blocks, ROWS, 2, BLOCK / 32] words,
// sums [TILE_ROWS, SUMS, TILE_OUTPUTS], which begin at zero where they are `fresh`.
template <int BLOCK, int ROWS, bool MAKES_PRODUCTS>
INLINE void dot_sum(
    const uint8_t* w, const uint32_t* x, const TileScales& of, int64_t blocks, bool fresh, float* sums
) {
    constexpr int V = BLOCK / 32;
    __m512 totals[ROWS];
    for (int r = 0; r < ROWS; ++r)
        totals[r] = fresh ? _mm512_setzero_ps() : _mm512_load_ps(sums + r * SUMS * TILE_OUTPUTS);
    float* products = of.products;
    for (int64_t b = 0; b < blocks; ++b, w += 64 * V, x += 2 * V * ROWS, products += TILE_ROWS * TILE_OUTPUTS) {
        if constexpr (MAKES_PRODUCTS) {
            const __m512 scales = _mm512_load_ps(of.scales + b * TILE_OUTPUTS);
            for (int r = 0; r < ROWS; ++r)
                _mm512_store_ps(products + r * TILE_OUTPUTS,
                                _mm512_mul_ps(scales, _mm512_set1_ps(of.steps[b * of.stride + r])));
        }
        __m512i q[V];
        for (int v = 0; v < V; ++v) q[v] = _mm512_load_si512(w + 64 * v);
        add_rows<V, ROWS < 4 ? ROWS : 4>(q, x, products, totals);
        if constexpr (ROWS > 4) add_rows<V, ROWS - 4>(q, x + 4 * 2 * V, products + 4 * TILE_OUTPUTS, totals + 4);
    }
    for (int r = 0; r < ROWS; ++r) _mm512_store_ps(sums + r * SUMS * TILE_OUTPUTS, totals[r]);
}

#elif defined(MIMO_FAST_AVX2)

// Values of 16 bits, by vpmaddwd: bytes would need twice the sums.

constexpr int TILE_ROWS = 4, TILE_OUTPUTS = 16;  // two registers of them
constexpr int WORD_VALUES = 2;
constexpr int X_WORDS = 1;
constexpr int64_t TILE_COLUMNS = 512;

using Lanes = Floats;
constexpr int LANES = 8;
INLINE Lanes load_lanes(const float* at) { return load(at); }
INLINE void store_lanes(float* at, Lanes a) { store(at, a); }
INLINE Lanes splat_lanes(float v) { return splat(v); }

// Words of one row of x, a block: [SUMS][BLOCK / 16].
template <int BITS, int BLOCK>
INLINE void pack_x(const int32_t* fixed, uint32_t* to) {
    constexpr int V = BLOCK / 16, WORDS = BLOCK * BITS / 32;
    for (int v = 0; v < V; ++v) {
        uint32_t words[SUMS];
        if constexpr (BITS == 4) {
            const int32_t* first = fixed + v % 4 * WORDS + v / 4 * 8;  // of planes v % 4 and 4 + v % 4
            store_ints(words, _mm256_blend_epi16(load_ints(first), _mm256_slli_epi32(load_ints(first + 4 * WORDS), 16), 0xAA));
        } else {
            const auto load = [&](int plane) {
                return _mm_loadu_si128(reinterpret_cast<const __m128i*>(fixed + plane * WORDS + 4 * v));
            };
            const __m128i even = _mm_blend_epi16(load(0), _mm_slli_epi32(load(1), 16), 0xAA);
            const __m128i odd = _mm_blend_epi16(load(2), _mm_slli_epi32(load(3), 16), 0xAA);
            store_ints(words, _mm256_set_m128i(_mm_unpackhi_epi32(even, odd), _mm_unpacklo_epi32(even, odd)));
        }
        for (int i = 0; i < SUMS; ++i) to[i * V + v] = words[i];
    }
}

// Registers i of eight words of 8 rows.
INLINE void transpose(__m256i (&rows)[8]) {
    __m256i pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);      // words 0, 1 (and 4, 5)
        pairs[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);  // words 2, 3 (and 6, 7)
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            fours[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);      // word 2 j (and 2 j + 4)
            fours[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);  // word 2 j + 1
        }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
    }
}

// A block of rows of W, whose words are rows[n]: values to [SUMS], `stride` bytes apart, [BLOCK / 16][TILE_OUTPUTS][2].
template <int BITS, int BLOCK>
INLINE void unpack(const uint8_t* const (&rows)[TILE_OUTPUTS], int64_t at, uint8_t* to, int64_t stride) {
    constexpr int PLANES = BITS == 4 ? 4 : 1, BYTES = BITS == 4 ? 32 : 16;
    for (int v = 0; v < BLOCK / 16; v += PLANES, at += BYTES)
        for (int half = 0; half < 2; ++half) {
            __m256i words[8];
            for (int n = 0; n < 8; ++n) {
                const uint8_t* from = rows[8 * half + n] + at;
                if constexpr (BITS == 4) words[n] = load_ints(from);
                else words[n] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
            }
            transpose(words);
            const __m256i nibbles = _mm256_set1_epi32(0xF000F);
            for (int i = 0; i < SUMS; ++i)
                for (int plane = 0; plane < PLANES; ++plane) {
                    const __m256i values = _mm256_srli_epi32(words[i], 4 * plane);
                    store_ints(to + i * stride + 64 * (v + plane) + 32 * half,
                               BITS == 4 ? _mm256_and_si256(values, nibbles) : values);
                }
        }
}

// One sum of each of ROWS rows of x: w [blocks, BLOCK / 16, TILE_OUTPUTS, 2], x [blocks, ROWS, BLOCK / 16] words,
// sums [TILE_ROWS, SUMS, TILE_OUTPUTS], which begin at zero where they are `fresh`.
template <int BLOCK, int ROWS, bool MAKES_PRODUCTS>
INLINE void dot_sum(
    const uint8_t* w, const uint32_t* x, const TileScales& of, int64_t blocks, bool fresh, float* sums
) {
    constexpr int V = BLOCK / 16;
    float* products = of.products;
    for (int r = 0; r < ROWS && fresh; ++r)
        for (int n = 0; n < 2; ++n) _mm256_store_ps(sums + r * SUMS * TILE_OUTPUTS + 8 * n, _mm256_setzero_ps());
    for (int64_t b = 0; b < blocks; ++b, w += 64 * V, x += V * ROWS, products += TILE_ROWS * TILE_OUTPUTS) {
        for (int n = 0; n < 2 && MAKES_PRODUCTS; ++n) {
            const __m256 scales = _mm256_load_ps(of.scales + b * TILE_OUTPUTS + 8 * n);
            for (int r = 0; r < ROWS; ++r)
                _mm256_store_ps(products + r * TILE_OUTPUTS + 8 * n,
                                _mm256_mul_ps(scales, _mm256_set1_ps(of.steps[b * of.stride + r])));
        }
        __m256i dots[ROWS][2];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            const __m256i q[2] = {load_ints(w + 64 * v), load_ints(w + 64 * v + 32)};
            for (int r = 0; r < ROWS; ++r) {
                const __m256i two = _mm256_set1_epi32(int(x[r * V + v]));
                for (int n = 0; n < 2; ++n) {
                    const __m256i product = _mm256_madd_epi16(q[n], two);
                    dots[r][n] = v ? _mm256_add_epi32(dots[r][n], product) : product;
                    asm("" : "+x"(dots[r][n]));  // sums stay as written: sums of sums need more registers
                }
            }
        }
        asm("" : "+r"(sums));  // not to be kept in registers, which are full
        for (int r = 0; r < ROWS; ++r)
            for (int n = 0; n < 2; ++n) {
                float* sum = sums + r * SUMS * TILE_OUTPUTS + 8 * n;
                _mm256_store_ps(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r][n]),
                                                     _mm256_load_ps(products + r * TILE_OUTPUTS + 8 * n),
                                                     _mm256_load_ps(sum)));
            }
    }
}

#endif

}  // namespace mimo_fast::MIMO_FAST_SET
