// The instructions that multiply integers, eight sums at a time, which is more than the latency of each takes. Values are
// none that would save power, since clocks follow it.

#include "integer_peak.h"

#include "simd.h"

namespace mimo_fast::MIMO_FAST_SET {

int64_t multiply_registers(int64_t rounds) {
#if defined(MIMO_FAST_AVX512)
    // vpdpbusd multiplies 64 bytes; a value of x has two.
    constexpr int64_t PRODUCTS = 32;
    const __m512i w = _mm512_set1_epi64(0x6DB2'5F91'3CE7'08A5), x = _mm512_set1_epi64(0x5A3D'81C6'972E'F41B);
    __m512i sums[8] = {w, x, w, x, w, x, w, x};
    for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 8
        for (auto& sum : sums) asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
#elif defined(MIMO_FAST_AVX2)
    // vpmaddwd multiplies 16 words, and vpaddd sums what it gives; the next product first, which is faster on Zen 4.
    constexpr int64_t PRODUCTS = 16;
    const __m256i w = _mm256_set1_epi64x(0x00B2'0091'00E7'00A5), x = _mm256_set1_epi64x(0x5A3D'81C6'972E'F41B);
    __m256i sums[8] = {w, x, w, x, w, x, w, x};
    __m256i products[2] = {w, x};
    for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            asm volatile("vpmaddwd %2, %1, %0" : "=x"(products[(i + 1) % 2]) : "x"(w), "x"(x));
            asm volatile("vpaddd %1, %0, %0" : "+x"(sums[i]) : "x"(products[i % 2]));
        }
#elif defined(MIMO_FAST_NEON)
    // smlal multiplies four words.
    constexpr int64_t PRODUCTS = 4;
    const int16x4_t w = vcreate_s16(0x00B2'0091'00E7'00A5), x = vcreate_s16(0x5A3D'81C6'972E'F41B);
    int32x4_t sums[8] = {};
    for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 8
        for (auto& sum : sums) asm volatile("smlal %0.4s, %1.4h, %2.4h" : "+w"(sum) : "w"(w), "w"(x));
#else
    constexpr int64_t PRODUCTS = 0;
#endif
    return rounds * 8 * PRODUCTS;
}

}  // namespace mimo_fast::MIMO_FAST_SET
