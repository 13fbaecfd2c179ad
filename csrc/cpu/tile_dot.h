// Products of tiles: TILE_OUTPUTS rows of packed weights, one a lane, with up to TILE_ROWS rows of x in fixed point.
// Sums of a block are integers, and their floats are added in the order of quantized_matmul.cpp: the same bits.
//
//     pack_x<BITS, BLOCK>       a block of one row of x, as tiles read it: [X_WORDS][V]
//     unpack<BITS>              blocks of TILE_OUTPUTS rows of W: [blocks][V][TILE_OUTPUTS]
//     dot_tile<BLOCK, ZEROS, ROWS>     sums of blocks += scale * step * (dot + offset - zero * total)
//     Lanes                     the floats of one register, for what is not integers
//
// Both operands are words of WORD_VALUES values, V a block; a word of W is multiplied by a word of x that is broadcast
// from memory. The words of a row of W are transposed by eights, so that a register has one of each row; each gives
// PLANES words of values, p of them further to the right: value k of word v = 8 (PLANES c + p) + i has the column
// (k PLANES + p) WORDS + 8 c + i of its block.
#pragma once

#include "simd.h"

namespace mimo_fast::MIMO_FAST_SET {

constexpr int SUMS = 8;  // of blocks: block b is added to number b % SUMS
constexpr int TILE_REGISTERS = 2;

// gcc keeps an array in registers where all of its indices are known early.
#define UNROLL _Pragma("GCC unroll 16")

// What is not of integers of `blocks` blocks, of a tile of x and one of W.
struct TileScales {
    const float* scales;     // [blocks, TILE_OUTPUTS]
    const float* steps;      // of row r and block b at b `stride` + r
    const int32_t* offsets;  // the same: what offset and x have in a block's sum
    int64_t stride;
    const float* zeros;      // as scales, where W has zeros
    const float* totals;     // as steps: sums of x
};

#if defined(MIMO_FAST_AVX512)

// Bytes, by vpdpbusd: 64 products. Zen 4 does that and the multiplications of floats in the same two units; 128 columns
// with the scale and the sum of their block take 66 cycles of which 64 are vpdpbusd.

constexpr int TILE_ROWS = 8;
constexpr int WORD_VALUES = 4, X_WORDS = 2;  // of a row in a word; x in high bytes and low bytes

struct Lanes {
    __m512 v;
};
using Words = __m512i;
INLINE Lanes load_lanes(const float* at) { return {_mm512_load_ps(at)}; }
INLINE void store_lanes(float* at, Lanes a) { _mm512_store_ps(at, a.v); }
INLINE Lanes splat_lanes(float v) { return {_mm512_set1_ps(v)}; }
INLINE Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE Lanes fnma(Lanes a, Lanes b, Lanes c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }

INLINE Words load_words(const void* at) { return _mm512_load_si512(at); }
INLINE void store_words(void* at, Words a) { _mm512_store_si512(at, a); }
INLINE Words splat_word(uint32_t v) { return _mm512_set1_epi32(int(v)); }
INLINE Lanes to_lanes(Words a) { return {_mm512_cvtepi32_ps(a)}; }
INLINE Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
INLINE Words both(Words a, Words b) { return _mm512_and_si512(a, b); }
INLINE Words shift_right(Words a, int by) { return _mm512_srli_epi32(a, by); }
INLINE Words low_words(Words a, Words b) { return _mm512_unpacklo_epi32(a, b); }
INLINE Words high_words(Words a, Words b) { return _mm512_unpackhi_epi32(a, b); }
INLINE Words low_pairs(Words a, Words b) { return _mm512_unpacklo_epi64(a, b); }
INLINE Words high_pairs(Words a, Words b) { return _mm512_unpackhi_epi64(a, b); }
INLINE Words even_quads(Words a, Words b) {
    return _mm512_permutex2var_epi64(a, _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0), b);
}
INLINE Words odd_quads(Words a, Words b) {
    return _mm512_permutex2var_epi64(a, _mm512_set_epi64(15, 14, 7, 6, 11, 10, 3, 2), b);
}
// Words 0 ... 7 of row n, with those of row n + 8 in the upper half, and, of a `whole` line, words 8 ... 15.
INLINE void load_line(const uint8_t* const* rows, int n, int64_t at, bool whole, Words& first, Words& second) {
    const auto load = [&](int row) { return _mm512_maskz_loadu_epi64(whole ? 0xFF : 0x0F, rows[row] + at); };
    const Words a = load(n), b = load(n + 8);
    first = _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1);
    second = _mm512_shuffle_i64x2(a, b, 0xEE);
}

// Words of four values each from 32-bit ones: their high bytes and their low bytes, x = 256 high + low.
INLINE void pack_eight(const __m256i (&x)[WORD_VALUES], uint32_t* to, int64_t stride) {
    const __m256i byte = _mm256_set1_epi32(255), second = _mm256_set1_epi32(0xFF00), half = _mm256_set1_epi32(128);
    __m256i high[WORD_VALUES], low[WORD_VALUES];
    for (int k = 0; k < WORD_VALUES; ++k) {
        high[k] = _mm256_and_si256(_mm256_add_epi32(x[k], half), second);
        low[k] = _mm256_and_si256(x[k], byte);
    }
    const auto either = [](__m256i a, __m256i b, __m256i c, __m256i d) {
        return _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
    };
    const auto left = [](__m256i a, int by) { return _mm256_slli_epi32(a, by); };
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        either(_mm256_srli_epi32(high[0], 8), high[1], left(high[2], 8), left(high[3], 16)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + stride),
                        either(low[0], left(low[1], 8), left(low[2], 16), left(low[3], 24)));
}

// offsets[r] + a block of W with row r of x, [ROWS][high, low][V] words.
template <int V, int ROWS>
INLINE void dot_words(
    const uint8_t* w, const uint32_t* x, const int32_t* offsets, Words (&dots)[ROWS][TILE_REGISTERS]
) {
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int n = 0; n < TILE_REGISTERS; ++n) dots[r][n] = _mm512_setzero_si512();
    UNROLL for (int part = 0; part < X_WORDS; ++part) {
        UNROLL for (int r = 0; r < ROWS && part; ++r)
            UNROLL for (int n = 0; n < TILE_REGISTERS; ++n)
                dots[r][n] = add(_mm512_slli_epi32(dots[r][n], 8), splat_word(offsets[r]));
#pragma GCC unroll 1
        for (int v = 0; v < V; ++v) {
            const Words q[TILE_REGISTERS] = {load_words(w + 128 * v), load_words(w + 128 * v + 64)};
            UNROLL for (int r = 0; r < ROWS; ++r) {
                const Words four = splat_word(x[(X_WORDS * r + part) * V + v]);
                // In place, where gcc would copy sums.
                UNROLL for (int n = 0; n < TILE_REGISTERS; ++n)
                    asm("vpdpbusd %2, %1, %0" : "+v"(dots[r][n]) : "v"(q[n]), "v"(four));
            }
        }
    }
}

#elif defined(MIMO_FAST_AVX2)

// Values of 16 bits, by vpmaddwd: bytes would need as many instructions, and more to widen their sums.

constexpr int TILE_ROWS = 4;
constexpr int WORD_VALUES = 2, X_WORDS = 1;

struct Lanes {
    __m256 v;
};
using Words = __m256i;
INLINE Lanes load_lanes(const float* at) { return {_mm256_load_ps(at)}; }
INLINE void store_lanes(float* at, Lanes a) { _mm256_store_ps(at, a.v); }
INLINE Lanes splat_lanes(float v) { return {_mm256_set1_ps(v)}; }
INLINE Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.v, b.v)}; }
INLINE Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.v, b.v)}; }
INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
INLINE Lanes fnma(Lanes a, Lanes b, Lanes c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }

INLINE Words load_words(const void* at) { return _mm256_load_si256(static_cast<const __m256i*>(at)); }
INLINE void store_words(void* at, Words a) { _mm256_store_si256(static_cast<__m256i*>(at), a); }
INLINE Words splat_word(uint32_t v) { return _mm256_set1_epi32(int(v)); }
INLINE Lanes to_lanes(Words a) { return {_mm256_cvtepi32_ps(a)}; }
INLINE Words add(Words a, Words b) { return _mm256_add_epi32(a, b); }
INLINE Words both(Words a, Words b) { return _mm256_and_si256(a, b); }
INLINE Words shift_right(Words a, int by) { return _mm256_srli_epi32(a, by); }
INLINE Words low_words(Words a, Words b) { return _mm256_unpacklo_epi32(a, b); }
INLINE Words high_words(Words a, Words b) { return _mm256_unpackhi_epi32(a, b); }
INLINE Words low_pairs(Words a, Words b) { return _mm256_unpacklo_epi64(a, b); }
INLINE Words high_pairs(Words a, Words b) { return _mm256_unpackhi_epi64(a, b); }
INLINE Words even_quads(Words a, Words b) { return _mm256_permute2x128_si256(a, b, 0x20); }
INLINE Words odd_quads(Words a, Words b) { return _mm256_permute2x128_si256(a, b, 0x31); }
INLINE void load_line(const uint8_t* const* rows, int n, int64_t at, bool whole, Words& first, Words& second) {
    const auto load = [&](int64_t from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[n] + from)); };
    first = load(at);
    if (whole) second = load(at + 32);
}

INLINE void pack_eight(const __m256i (&x)[WORD_VALUES], uint32_t* to, int64_t) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_blend_epi16(x[0], _mm256_slli_epi32(x[1], 16), 0xAA));
}

// offsets[r] + a block of W with row r of x, [ROWS][V] words.
template <int V, int ROWS>
INLINE void dot_words(
    const uint8_t* w, const uint32_t* x, const int32_t* offsets, Words (&dots)[ROWS][TILE_REGISTERS]
) {
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int n = 0; n < TILE_REGISTERS; ++n) dots[r][n] = splat_word(offsets[r]);
    const auto step = [&](int v) __attribute__((always_inline)) {
        const Words q[TILE_REGISTERS] = {load_words(w + 64 * v), load_words(w + 64 * v + 32)};
        // Products of two rows come before their sums: Zen 4 does fewer of both where a sum follows its product at once.
        UNROLL for (int r = 0; r < ROWS; r += 2) {
            Words products[2][TILE_REGISTERS];
            for (int i = 0; i < 2 && r + i < ROWS; ++i)
                UNROLL for (int n = 0; n < TILE_REGISTERS; ++n)
                    products[i][n] = _mm256_madd_epi16(q[n], splat_word(x[(r + i) * V + v]));
            // In place, where gcc would copy sums.
            for (int i = 0; i < 2 && r + i < ROWS; ++i)
                UNROLL for (int n = 0; n < TILE_REGISTERS; ++n)
                    asm("vpaddd %1, %0, %0" : "+x"(dots[r + i][n]) : "x"(products[i][n]));
        }
    };
#pragma GCC unroll 1
    for (int v = 0; v < V; v += 2) {
        step(v);
        step(v + 1);
    }
}

#endif

#if defined(MIMO_FAST_AVX512) || defined(MIMO_FAST_AVX2)

// gcc takes a function that does nothing but __builtin_prefetch for one without effect, and leaves out its calls.
INLINE void fetch(const void* at) { asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(at))); }

constexpr int LANES = sizeof(Words) / 4;
constexpr int TILE_OUTPUTS = TILE_REGISTERS * LANES;
constexpr int64_t TILE_COLUMNS = 512;  // at once: W unpacked fills half of a first cache of 32 KB
template <int BITS>
constexpr int PLANES = 32 / BITS / WORD_VALUES;

template <int BITS, int BLOCK>
INLINE void pack_x(const int32_t* fixed, uint32_t* to) {
    constexpr int WORDS = BLOCK * BITS / 32, V = BLOCK / WORD_VALUES;
    for (int at = 0; at < WORDS; at += 8)
        for (int p = 0; p < PLANES<BITS>; ++p) {
            __m256i x[WORD_VALUES];
            for (int k = 0; k < WORD_VALUES; ++k)
                x[k] = _mm256_loadu_si256(
                    reinterpret_cast<const __m256i*>(fixed + (k * PLANES<BITS> + p) * WORDS + at));
            pack_eight(x, to + PLANES<BITS> * at + 8 * p, V);
        }
}

// Registers i of eight words of LANES rows, of which row n + 8 is in the upper half of rows[n].
INLINE void transpose(Words (&rows)[8]) {
    Words pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = low_words(rows[i], rows[i + 1]);       // words 0, 1 (and 4, 5)
        pairs[i + 1] = high_words(rows[i], rows[i + 1]);  // words 2, 3 (and 6, 7)
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            fours[i + 2 * j] = low_pairs(pairs[i + j], pairs[i + j + 2]);       // word 2 j (and 2 j + 4)
            fours[i + 2 * j + 1] = high_pairs(pairs[i + j], pairs[i + j + 2]);  // word 2 j + 1
        }
    for (int i = 0; i < 4; ++i) {
        rows[i] = even_quads(fours[i], fours[i + 4]);
        rows[i + 4] = odd_quads(fours[i], fours[i + 4]);
    }
}

// take(j, n, values): column j of rows n ... n + LANES - 1, for each of eight columns and of the tile's registers.
template <class Take>
INLINE void transpose_rows(const float (&rows)[TILE_OUTPUTS][8], Take take) {
    const uint8_t* places[TILE_OUTPUTS];
    for (int i = 0; i < TILE_OUTPUTS; ++i) places[i] = reinterpret_cast<const uint8_t*>(rows[i]);
    for (int n = 0; n < TILE_OUTPUTS; n += LANES) {
        Words words[8], none;
        for (int i = 0; i < 8; ++i) load_line(places + n, i, 0, false, words[i], none);
        transpose(words);
        for (int j = 0; j < 8; ++j) take(j, n, words[j]);
    }
}

// `bytes` of each row, which are of whole blocks.
template <int BITS>
INLINE void unpack(const uint8_t* const (&rows)[TILE_OUTPUTS], int64_t bytes, uint8_t* to) {
    constexpr int ROW = 4 * TILE_OUTPUTS;  // bytes of word v
    constexpr uint32_t VALUE = WORD_VALUES == 2 ? (1 << BITS) - 1 : BITS == 4 ? 0x0F0F : 0xFFFF;
    const Words values = splat_word(VALUE << 16 | VALUE);
    const auto unpack_eight = [&](Words (&words)[8], uint8_t* word) {
        transpose(words);
        for (int i = 0; i < 8; ++i)
            for (int p = 0; p < PLANES<BITS>; ++p)
                store_words(word + (8 * p + i) * ROW, both(shift_right(words[i], BITS * p), values));
    };
    for (int n = 0; n < TILE_REGISTERS; ++n) {
        uint8_t* word = to + n * 4 * LANES;
        // By lines of the cache, since rows may be so far apart that all of their lines are in one set.
        for (int64_t at = 0; at < bytes; at += 64, word += 16 * PLANES<BITS> * ROW) {
            const bool whole = at + 64 <= bytes;
            Words first[8], second[8];
            for (int i = 0; i < 8; ++i) load_line(rows + n * LANES, i, at, whole, first[i], second[i]);
            unpack_eight(first, word);
            if (whole) unpack_eight(second, word + 8 * PLANES<BITS> * ROW);
        }
    }
}

// w [blocks, V, TILE_OUTPUTS], x [blocks, ROWS, X_WORDS, V] words; block `first` + b is added to number
// (first + b) % SUMS of sums [SUMS, TILE_ROWS, TILE_OUTPUTS].
template <int BLOCK, bool ZEROS, int ROWS>
INLINE void dot_tile(
    const uint8_t* w, const uint32_t* x, const TileScales& of, int64_t first, int64_t blocks, float* sums
) {
    constexpr int V = BLOCK / WORD_VALUES;
    for (int64_t b = 0; b < blocks; ++b, w += 4 * TILE_OUTPUTS * V, x += ROWS * X_WORDS * V) {
        Words dots[ROWS][TILE_REGISTERS];
        dot_words<V, ROWS>(w, x, of.offsets + b * of.stride, dots);
        float* to = sums + (first + b) % SUMS * (TILE_ROWS * TILE_OUTPUTS);
        UNROLL for (int n = 0; n < TILE_REGISTERS; ++n) {
            const int64_t outputs = b * TILE_OUTPUTS + n * LANES, rows = b * of.stride;
            const Lanes scales = load_lanes(of.scales + outputs);
            const Lanes zeros = ZEROS ? load_lanes(of.zeros + outputs) : splat_lanes(0.0f);
            UNROLL for (int r = 0; r < ROWS; ++r) {
                float* at = to + r * TILE_OUTPUTS + n * LANES;
                Lanes dot = to_lanes(dots[r][n]);
                if constexpr (ZEROS) dot = fnma(zeros, splat_lanes(of.totals[rows + r]), dot);
                store_lanes(at, fma(dot, scales * splat_lanes(of.steps[rows + r]), load_lanes(at)));
            }
        }
    }
}

#endif

}  // namespace mimo_fast::MIMO_FAST_SET
