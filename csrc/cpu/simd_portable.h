// `simd.h` in plain C++, in loops that a compiler can turn into whatever vectors it has.
#pragma once

namespace mimo_fast::MIMO_FAST_SET {

struct Floats {
    float v[8];
};
struct Ints {
    int32_t v[8];
};

#define EACH(Result, expression)              \
    Result result;                            \
    for (int i = 0; i < 8; ++i) result.v[i] = (expression); \
    return result

INLINE Floats load(const float* p) { EACH(Floats, p[i]); }
INLINE void store(float* p, const Floats& a) { std::memcpy(p, a.v, sizeof a.v); }
INLINE Floats splat(float x) { EACH(Floats, x); }
INLINE Floats operator+(const Floats& a, const Floats& b) { EACH(Floats, a.v[i] + b.v[i]); }
INLINE Floats operator-(const Floats& a, const Floats& b) { EACH(Floats, a.v[i] - b.v[i]); }
INLINE Floats operator*(const Floats& a, const Floats& b) { EACH(Floats, a.v[i] * b.v[i]); }
INLINE Floats operator/(const Floats& a, const Floats& b) { EACH(Floats, a.v[i] / b.v[i]); }
INLINE Floats min(const Floats& a, const Floats& b) { EACH(Floats, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
INLINE Floats max(const Floats& a, const Floats& b) { EACH(Floats, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
INLINE Floats abs(const Floats& a) { EACH(Floats, __builtin_fabsf(a.v[i])); }
INLINE Floats fma(const Floats& a, const Floats& b, const Floats& c) { EACH(Floats, a.v[i] * b.v[i] + c.v[i]); }
INLINE Floats fnma(const Floats& a, const Floats& b, const Floats& c) { EACH(Floats, c.v[i] - a.v[i] * b.v[i]); }
INLINE Floats select_negative(const Floats& x, const Floats& a, const Floats& b) {
    EACH(Floats, __builtin_signbit(x.v[i]) ? a.v[i] : b.v[i]);
}

INLINE Ints splat(int32_t x) { EACH(Ints, x); }
INLINE Ints operator+(const Ints& a, const Ints& b) { EACH(Ints, a.v[i] + b.v[i]); }
template <int N>
INLINE Ints shift_left(const Ints& a) { EACH(Ints, int32_t(uint32_t(a.v[i]) << N)); }
// 1.5 2^23 leaves no bits for a fraction.
INLINE Ints round(const Floats& a) { EACH(Ints, int32_t((a.v[i] + 12582912.0f) - 12582912.0f)); }
INLINE Floats to_floats(const Ints& a) { EACH(Floats, float(a.v[i])); }
INLINE Floats as_floats(const Ints& a) {
    Floats result;
    std::memcpy(result.v, a.v, sizeof a.v);
    return result;
}
INLINE Ints load(const int32_t* p) { EACH(Ints, p[i]); }
INLINE void store(int32_t* p, const Ints& a) { std::memcpy(p, a.v, sizeof a.v); }

INLINE Floats times_power(const Floats& a, const Ints& n) {
    int32_t bits[8];
    std::memcpy(bits, a.v, sizeof bits);
    for (int i = 0; i < 8; ++i) bits[i] += int32_t(uint32_t(n.v[i]) << 23);
    Floats result;
    std::memcpy(result.v, bits, sizeof bits);
    return result;
}

INLINE float from_bfloat16(uint16_t bits);
INLINE float from_float16(uint16_t bits);
INLINE uint16_t to_bfloat16(float value);
INLINE Floats load_bfloat16(const uint16_t* p) { EACH(Floats, from_bfloat16(p[i])); }
INLINE Floats load_float16(const uint16_t* p) { EACH(Floats, from_float16(p[i])); }

INLINE void store_bfloat16(uint16_t* p, const Floats& a) {
    for (int i = 0; i < 8; ++i) p[i] = to_bfloat16(a.v[i]);
}

#undef EACH

INLINE float sum(const Floats& a) {
    float four[4];
    for (int i = 0; i < 4; ++i) four[i] = a.v[i] + a.v[i + 4];
    return (four[0] + four[2]) + (four[1] + four[3]);
}
INLINE float largest(const Floats& a) {
    float most = a.v[0];
    for (int i = 1; i < 8; ++i) most = a.v[i] > most ? a.v[i] : most;
    return most;
}
INLINE Ints each_sum(const Ints (&a)[8]) {
    Ints result = splat(0);
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j) result.v[i] += a[i].v[j];
    return result;
}
INLINE void store_sums(const Floats* a, float* y) {
    for (int n = 0; n < 4; ++n) {
        const float* v = a[n].v;
        y[n] = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    }
}

}  // namespace mimo_fast::MIMO_FAST_SET
