// Products of one block of packed weights with R rows of x in fixed point: exact integers, the same in every set.
//
//     dot_4_bits<BLOCK, R>    where SPLITS_X, x = 256 high + low, both bytes: sums of q high and of q low
//     dot_8_bits<BLOCK, R>    x of 16 bits, as for 4 bits where not SPLITS_X
//
// The sum over a block is in lanes, of which lane i has the products of columns whose places in their 32 nibbles are 4 i
// ... 4 i + 3, or in their 16 bytes 2 i and 2 i + 1; in portable C++ it is all in lane 0. The order of columns in x is
// `UnpackingOrder` of quantized_matmul.cpp: bytes in order, the low nibbles of NIBBLE_BYTES bytes before their high ones.
//
// Bounds. 4 bits: a product is at most 15 * 128 = 1,920. 8 bits: at most 255 * 32,512, of which 128 fit 31 bits.
#pragma once

#include "simd.h"

namespace mimo_fast::MIMO_FAST_SET {

#if defined(MIMO_FAST_AVX512)

constexpr bool SPLITS_X = true;
template <int BLOCK>
constexpr int NIBBLE_BYTES = BLOCK / 2;

// The two halves of a register are as two registers of AVX2.
INLINE Ints folded(__m512i v) {
    return {_mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1))};
}

// vpdpbusd: 64 (32) products an instruction, summed by fours into 32 bits.
template <int BLOCK, int R>
INLINE void dot_4_bits(const uint8_t* words, const int8_t* high, const int8_t* low, int64_t stride, Ints (&out)[R]) {
    if constexpr (BLOCK == 128) {
        const __m512i bytes = _mm512_loadu_si512(words), nibble = _mm512_set1_epi8(15), zero = _mm512_setzero_si512();
        const __m512i q0 = _mm512_and_si512(bytes, nibble);
        const __m512i q1 = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
        for (int r = 0; r < R; ++r, high += stride, low += stride) {
            __m512i sum = _mm512_dpbusd_epi32(zero, q0, _mm512_loadu_si512(high));
            sum = _mm512_slli_epi32(_mm512_dpbusd_epi32(sum, q1, _mm512_loadu_si512(high + 64)), 8);
            sum = _mm512_dpbusd_epi32(sum, q0, _mm512_loadu_si512(low));
            out[r] = folded(_mm512_dpbusd_epi32(sum, q1, _mm512_loadu_si512(low + 64)));
        }
    } else {
        const auto load = [](const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); };
        const __m256i bytes = load(words), nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
        const __m256i q0 = _mm256_and_si256(bytes, nibble);
        const __m256i q1 = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
        for (int r = 0; r < R; ++r, high += stride, low += stride) {
            __m256i h = _mm256_dpbusd_epi32(zero, q0, load(high)), l = _mm256_dpbusd_epi32(zero, q0, load(low));
            h = _mm256_dpbusd_epi32(h, q1, load(high + 32));
            l = _mm256_dpbusd_epi32(l, q1, load(low + 32));
            out[r] = {_mm256_add_epi32(_mm256_slli_epi32(h, 8), l)};
        }
    }
}

// vpdpwssd: 32 products an instruction, summed by twos.
template <int BLOCK, int R>
INLINE void dot_8_bits(const uint8_t* words, const int16_t* x, int64_t stride, Ints (&out)[R]) {
    constexpr int V = BLOCK / 32;
    __m512i q[V];
    for (int v = 0; v < V; ++v)
        q[v] = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + 32 * v)));
    for (int r = 0; r < R; ++r, x += stride) {
        __m512i sum = _mm512_setzero_si512();
        for (int v = 0; v < V; ++v) sum = _mm512_dpwssd_epi32(sum, q[v], _mm512_loadu_si512(x + 32 * v));
        out[r] = folded(sum);
    }
}

#elif defined(MIMO_FAST_AVX2)

constexpr bool SPLITS_X = true;
template <int BLOCK>
constexpr int NIBBLE_BYTES = 32;

INLINE __m256i load_bytes(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

// vpmaddubsw: 32 products an instruction. A lane of 16 bits gets at most 4 sums of two products, 15,360.
template <int BLOCK, int R>
INLINE void dot_4_bits(const uint8_t* words, const int8_t* high, const int8_t* low, int64_t stride, Ints (&out)[R]) {
    constexpr int V = BLOCK / 64;
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i q[2 * V];
    for (int v = 0; v < V; ++v) {
        const __m256i bytes = load_bytes(words + 32 * v);
        q[2 * v] = _mm256_and_si256(bytes, nibble);
        q[2 * v + 1] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
    }
    for (int r = 0; r < R; ++r, high += stride, low += stride) {
        __m256i h = _mm256_maddubs_epi16(q[0], load_bytes(high)), l = _mm256_maddubs_epi16(q[0], load_bytes(low));
        for (int i = 1; i < 2 * V; ++i) {
            h = _mm256_add_epi16(h, _mm256_maddubs_epi16(q[i], load_bytes(high + 32 * i)));
            l = _mm256_add_epi16(l, _mm256_maddubs_epi16(q[i], load_bytes(low + 32 * i)));
        }
        out[r] = {_mm256_add_epi32(_mm256_slli_epi32(_mm256_madd_epi16(h, ones), 8), _mm256_madd_epi16(l, ones))};
    }
}

// vpmaddwd: 16 products an instruction.
template <int BLOCK, int R>
INLINE void dot_8_bits(const uint8_t* words, const int16_t* x, int64_t stride, Ints (&out)[R]) {
    constexpr int V = BLOCK / 16;
    __m256i q[V];
    for (int v = 0; v < V; ++v)
        q[v] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words + 16 * v)));
    for (int r = 0; r < R; ++r, x += stride) {
        __m256i sum = _mm256_madd_epi16(q[0], load_bytes(x));
        for (int v = 1; v < V; ++v) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(q[v], load_bytes(x + 16 * v)));
        out[r] = {sum};
    }
}

#elif defined(MIMO_FAST_NEON)

constexpr bool SPLITS_X = true;
template <int BLOCK>
constexpr int NIBBLE_BYTES = 32;

// Sums of q x over blocks of 32 places; a lane of 16 bits gets at most 4 products, 7,680.
template <int N>
INLINE Ints dot_bytes(const int8x16_t (&q)[2 * N], const int8_t* x) {
    int16x8_t sum[4];
    for (int half = 0; half < 2; ++half) {
        const int8x16_t first = vld1q_s8(x + 16 * half);
        sum[2 * half] = vmull_s8(vget_low_s8(q[half]), vget_low_s8(first));
        sum[2 * half + 1] = vmull_high_s8(q[half], first);
        for (int n = 1; n < N; ++n) {
            const int8x16_t next = vld1q_s8(x + 32 * n + 16 * half);
            sum[2 * half] = vmlal_s8(sum[2 * half], vget_low_s8(q[2 * n + half]), vget_low_s8(next));
            sum[2 * half + 1] = vmlal_high_s8(sum[2 * half + 1], q[2 * n + half], next);
        }
    }
    return {vpaddq_s32(vpaddlq_s16(sum[0]), vpaddlq_s16(sum[1])),
            vpaddq_s32(vpaddlq_s16(sum[2]), vpaddlq_s16(sum[3]))};
}

template <int BLOCK, int R>
INLINE void dot_4_bits(const uint8_t* words, const int8_t* high, const int8_t* low, int64_t stride, Ints (&out)[R]) {
    constexpr int N = BLOCK / 32;
    int8x16_t q[2 * N];
    for (int n = 0; n < N; n += 2)
        for (int half = 0; half < 2; ++half) {
            const uint8x16_t bytes = vld1q_u8(words + 16 * n + 16 * half);
            q[2 * n + half] = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
            q[2 * n + 2 + half] = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
        }
    for (int r = 0; r < R; ++r, high += stride, low += stride)
        out[r] = shift_left<8>(dot_bytes<N>(q, high)) + dot_bytes<N>(q, low);
}

template <int BLOCK, int R>
INLINE void dot_8_bits(const uint8_t* words, const int16_t* x, int64_t stride, Ints (&out)[R]) {
    for (int r = 0; r < R; ++r, x += stride) {
        int32x4_t sum[4] = {};
        for (int n = 0; n < BLOCK; n += 16) {
            const uint8x16_t bytes = vld1q_u8(words + n);
            const int16x8_t q0 = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes)));
            const int16x8_t q1 = vreinterpretq_s16_u16(vmovl_high_u8(bytes));
            const int16x8_t x0 = vld1q_s16(x + n), x1 = vld1q_s16(x + n + 8);
            sum[0] = vmlal_s16(sum[0], vget_low_s16(q0), vget_low_s16(x0));
            sum[1] = vmlal_high_s16(sum[1], q0, x0);
            sum[2] = vmlal_s16(sum[2], vget_low_s16(q1), vget_low_s16(x1));
            sum[3] = vmlal_high_s16(sum[3], q1, x1);
        }
        out[r] = {vpaddq_s32(sum[0], sum[1]), vpaddq_s32(sum[2], sum[3])};
    }
}

#else

constexpr bool SPLITS_X = false;
template <int BLOCK>
constexpr int NIBBLE_BYTES = 32;

// R rows of x at `stride` with q. Compilers know this loop: x86-64 has it in SSE2, pmaddwd. The sum is in lane 0.
template <int BLOCK, int R>
INLINE void dot_words(const int16_t (&q)[BLOCK], const int16_t* x, int64_t stride, Ints (&out)[R]) {
    for (int r = 0; r < R; ++r, x += stride) {
        int32_t sum = 0;
        for (int i = 0; i < BLOCK; ++i) sum += int32_t(q[i]) * x[i];
        out[r] = splat(0);
        out[r].v[0] = sum;
    }
}

template <int BLOCK, int R>
INLINE void dot_4_bits(const uint8_t* words, const int16_t* x, int64_t stride, Ints (&out)[R]) {
    int16_t q[BLOCK];
    for (int n = 0; n < BLOCK; n += 64) {
        for (int i = 0; i < 32; ++i) q[n + i] = words[n / 2 + i] & 15;
        for (int i = 0; i < 32; ++i) q[n + 32 + i] = words[n / 2 + i] >> 4;
    }
    dot_words<BLOCK, R>(q, x, stride, out);
}

template <int BLOCK, int R>
INLINE void dot_8_bits(const uint8_t* words, const int16_t* x, int64_t stride, Ints (&out)[R]) {
    int16_t q[BLOCK];
    for (int i = 0; i < BLOCK; ++i) q[i] = words[i];
    dot_words<BLOCK, R>(q, x, stride, out);
}

#endif

}  // namespace mimo_fast::MIMO_FAST_SET
