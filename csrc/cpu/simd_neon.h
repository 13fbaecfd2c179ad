// `simd.h` by NEON of AArch64: two registers of four.
#pragma once

#include <arm_neon.h>

namespace mimo_fast::MIMO_FAST_SET {

struct Floats {
    float32x4_t low, high;
};
struct Ints {
    int32x4_t low, high;
};

INLINE Floats load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
INLINE void store(float* p, Floats a) { vst1q_f32(p, a.low), vst1q_f32(p + 4, a.high); }
INLINE Floats splat(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
INLINE Floats operator+(Floats a, Floats b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
INLINE Floats operator-(Floats a, Floats b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
INLINE Floats operator*(Floats a, Floats b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
INLINE Floats operator/(Floats a, Floats b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
INLINE Floats min(Floats a, Floats b) { return {vminq_f32(a.low, b.low), vminq_f32(a.high, b.high)}; }
INLINE Floats max(Floats a, Floats b) { return {vmaxq_f32(a.low, b.low), vmaxq_f32(a.high, b.high)}; }
INLINE Floats abs(Floats a) { return {vabsq_f32(a.low), vabsq_f32(a.high)}; }
INLINE Floats fma(Floats a, Floats b, Floats c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
INLINE Floats fnma(Floats a, Floats b, Floats c) {
    return {vfmsq_f32(c.low, a.low, b.low), vfmsq_f32(c.high, a.high, b.high)};
}
INLINE uint32x4_t sign_mask(float32x4_t x) { return vcltzq_s32(vreinterpretq_s32_f32(x)); }
INLINE Floats select_negative(Floats x, Floats a, Floats b) {
    return {vbslq_f32(sign_mask(x.low), a.low, b.low), vbslq_f32(sign_mask(x.high), a.high, b.high)};
}

INLINE Ints splat(int32_t i) { return {vdupq_n_s32(i), vdupq_n_s32(i)}; }
INLINE Ints operator+(Ints a, Ints b) { return {vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)}; }
template <int N>
INLINE Ints shift_left(Ints a) { return {vshlq_n_s32(a.low, N), vshlq_n_s32(a.high, N)}; }
INLINE Ints round(Floats a) { return {vcvtnq_s32_f32(a.low), vcvtnq_s32_f32(a.high)}; }
INLINE Floats to_floats(Ints a) { return {vcvtq_f32_s32(a.low), vcvtq_f32_s32(a.high)}; }
INLINE Floats as_floats(Ints a) { return {vreinterpretq_f32_s32(a.low), vreinterpretq_f32_s32(a.high)}; }
INLINE Ints load(const int32_t* p) { return {vld1q_s32(p), vld1q_s32(p + 4)}; }
INLINE void store(int32_t* p, Ints a) { vst1q_s32(p, a.low), vst1q_s32(p + 4, a.high); }
INLINE float32x4_t times_power(float32x4_t a, int32x4_t n) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), vshlq_n_s32(n, 23)));
}
INLINE Floats times_power(Floats a, Ints n) { return {times_power(a.low, n.low), times_power(a.high, n.high)}; }

INLINE Floats load_bfloat16(const uint16_t* p) {
    const uint16x8_t bits = vld1q_u16(p);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)),
            vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(bits), 16))};
}
INLINE Floats load_float16(const uint16_t* p) {
    const float16x8_t values = vreinterpretq_f16_u16(vld1q_u16(p));
    return {vcvt_f32_f16(vget_low_f16(values)), vcvt_f32_f16(vget_high_f16(values))};
}

INLINE uint16x4_t to_bfloat16(float32x4_t a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd);
    return vbsl_u16(vmovn_u32(vceqq_f32(a, a)), vshrn_n_u32(rounded, 16), vdup_n_u16(0x7FC0));
}
INLINE void store_bfloat16(uint16_t* p, Floats a) {
    vst1q_u16(p, vcombine_u16(to_bfloat16(a.low), to_bfloat16(a.high)));
}

INLINE float sum(Floats a) {
    const float32x4_t four = vaddq_f32(a.low, a.high);
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
INLINE float largest(Floats a) { return vmaxvq_f32(vmaxq_f32(a.low, a.high)); }
INLINE Ints each_sum(const Ints (&a)[8]) {
    const auto fours = [&](int i) {
        const auto halves = [&](int n) { return vaddq_s32(a[n].low, a[n].high); };
        return vpaddq_s32(vpaddq_s32(halves(i), halves(i + 1)), vpaddq_s32(halves(i + 2), halves(i + 3)));
    };
    return {fours(0), fours(4)};
}
INLINE void store_sums(const Floats* a, float* y) {
    const float32x4_t low = vpaddq_f32(vpaddq_f32(a[0].low, a[1].low), vpaddq_f32(a[2].low, a[3].low));
    const float32x4_t high = vpaddq_f32(vpaddq_f32(a[0].high, a[1].high), vpaddq_f32(a[2].high, a[3].high));
    vst1q_f32(y, vaddq_f32(low, high));
}

}  // namespace mimo_fast::MIMO_FAST_SET
