// Eight frames at once, one in each lane of a vector, so that every step is the scalar one. The real transform of `size`
// points is a complex one of half as many, z[t] = x[2 t] + i x[2 t + 1], by mixed radices (Stockham's order, which needs
// no permutation):
//
//     Z[k] = (X[k] + conj X[N - k]) + i (X[k] - conj X[N - k]) e^(2 pi i k / size),    N = size / 2

#include "inverse_stft.h"

#include "activations.h"

namespace mimo_fast::MIMO_FAST_SET {
namespace {

constexpr int LANES = 8;
constexpr float LARGEST_MAGNITUDE = 100;

struct Complex {
    Floats re, im;
};

INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
INLINE Complex times_i(Complex a) { return {-a.im, a.re}; }
INLINE Complex scaled(Complex a, float factor) { return {a.re * splat(factor), a.im * splat(factor)}; }
INLINE Complex times(Complex a, const float* w) {
    const Floats re = splat(w[0]), im = splat(w[1]);
    return {fnma(a.im, im, a.re * re), fma(a.im, re, a.re * im)};
}
INLINE Complex read(const float* at) { return {load(at), load(at + LANES)}; }
INLINE void write(float* at, Complex a) {
    store(at, a.re);
    store(at + LANES, a.im);
}

// The inverse transform of 2, 3, 4 or 5 points in place.
INLINE void transform_2(Complex* a) {
    const Complex sum = a[0] + a[1];
    a[1] = a[0] - a[1];
    a[0] = sum;
}

INLINE void transform_3(Complex* a) {
    const Complex sum = a[1] + a[2], turned = times_i(scaled(a[1] - a[2], 0.86602540f));
    const Complex middle = a[0] - scaled(sum, 0.5f);
    a[0] = a[0] + sum;
    a[1] = middle + turned;
    a[2] = middle - turned;
}

INLINE void transform_4(Complex* a) {
    const Complex even = a[0] + a[2], odd = a[1] + a[3], other = a[0] - a[2], turned = times_i(a[1] - a[3]);
    a[0] = even + odd;
    a[1] = other + turned;
    a[2] = even - odd;
    a[3] = other - turned;
}

INLINE void transform_5(Complex* a) {
    constexpr float c1 = 0.30901699f, c2 = -0.80901699f, s1 = 0.95105652f, s2 = 0.58778525f;
    const Complex outer = a[1] + a[4], inner = a[2] + a[3], far = a[1] - a[4], near = a[2] - a[3];
    const Complex m1 = a[0] + scaled(outer, c1) + scaled(inner, c2), m2 = a[0] + scaled(outer, c2) + scaled(inner, c1);
    const Complex t1 = times_i(scaled(far, s1) + scaled(near, s2)), t2 = times_i(scaled(far, s2) - scaled(near, s1));
    a[0] = a[0] + outer + inner;
    a[1] = m1 + t1;
    a[4] = m1 - t1;
    a[2] = m2 + t2;
    a[3] = m2 - t2;
}

// A stage over `points` points, `apart` transforms side by side: x -> y, [size / 2, 2, LANES] each.
template <int R>
void stage(const float* x, float* y, int64_t points, int64_t apart, const float* twiddles) {
    const int64_t each = points / R;
    for (int64_t q = 0; q < each; ++q, twiddles += 2 * R)
        for (int64_t k = 0; k < apart; ++k) {
            Complex a[R];
            for (int j = 0; j < R; ++j) a[j] = read(x + 2 * LANES * (k + apart * (q + each * j)));
            if constexpr (R == 2) transform_2(a);
            else if constexpr (R == 3) transform_3(a);
            else if constexpr (R == 4) transform_4(a);
            else transform_5(a);
            for (int j = 0; j < R; ++j) write(y + 2 * LANES * (k + apart * (R * q + j)), times(a[j], twiddles + 2 * j));
        }
}

// `stage` of any radix.
void any_stage(
    const float* x, float* y, int64_t points, int64_t apart, int64_t radix, const float* twiddles, const float* roots
) {
    const int64_t each = points / radix;
    for (int64_t q = 0; q < each; ++q, twiddles += 2 * radix)
        for (int64_t k = 0; k < apart; ++k)
            for (int64_t i = 0; i < radix; ++i) {
                Complex total = {splat(0.0f), splat(0.0f)};
                for (int64_t j = 0; j < radix; ++j)
                    total = total + times(read(x + 2 * LANES * (k + apart * (q + each * j))), roots + 2 * (i * j % radix));
                write(y + 2 * LANES * (k + apart * (radix * q + i)), times(total, twiddles + 2 * i));
            }
}

// Magnitudes and phases of `count` frequencies from i on, at most LANES of them, of one lane: real and imaginary parts.
INLINE void polar(const float* head, int64_t bins, int64_t i, int64_t count, float* spectrum, int lane) {
    float magnitudes[LANES] = {}, phases[LANES] = {}, re[LANES], im[LANES];
    for (int64_t j = 0; j < count; ++j) {
        magnitudes[j] = head[i + j];
        phases[j] = head[bins + i + j];
    }
    // Infinity times 0 is NaN: the limit below would make a number of what is infinite.
    const Floats log = load(magnitudes), angle = load(phases);
    const Floats magnitude = min(splat(LARGEST_MAGNITUDE), exp(fma(log, splat(0.0f), log)));
    Floats sine, cosine;
    if (largest(abs(angle)) <= LARGEST_ANGLE) {
        sine_and_cosine(angle, sine, cosine);
    } else {
        for (int j = 0; j < LANES; ++j) {
            re[j] = float(std::cos(double(phases[j])));
            im[j] = float(std::sin(double(phases[j])));
        }
        cosine = load(re);
        sine = load(im);
    }
    store(re, magnitude * cosine);
    store(im, magnitude * sine);
    for (int64_t j = 0; j < count; ++j) {
        spectrum[2 * LANES * (i + j) + lane] = re[j];
        spectrum[2 * LANES * (i + j) + LANES + lane] = im[j];
    }
}

}  // namespace

void inverse_stft(const InverseStft& stft, const float* head, int64_t T, float* frames) {
    const int64_t N = stft.size / 2, bins = N + 1;
    Buffer<float> spectrum(2 * LANES * bins), first(2 * LANES * N), second(2 * LANES * N);
    for (int64_t t = 0; t < T; t += LANES) {
        const int lanes = int(least(LANES, T - t));
        for (int lane = 0; lane < lanes; ++lane)
            for (int64_t i = 0; i < bins; i += LANES)
                polar(head + (t + lane) * 2 * bins, bins, i, least(LANES, bins - i), spectrum.data(), lane);
        float *x = first.data(), *y = second.data();
        for (int64_t k = 0; k < N; ++k) {
            Complex a = read(spectrum.data() + 2 * LANES * k), b = read(spectrum.data() + 2 * LANES * (N - k));
            // The ends of a real signal's spectrum are real.
            if (k == 0) a.im = b.im = splat(0.0f);
            b.im = -b.im;
            write(x + 2 * LANES * k, a + b + times_i(times(a - b, stft.halves.data() + 2 * k)));
        }
        const float *twiddles = stft.twiddles.data(), *roots = stft.roots.data();
        int64_t points = N, apart = 1;
        for (size_t i = 0; i < stft.radices.size(); ++i) {
            const int64_t radix = stft.radices[i];
            if (radix == 2) stage<2>(x, y, points, apart, twiddles);
            else if (radix == 3) stage<3>(x, y, points, apart, twiddles);
            else if (radix == 4) stage<4>(x, y, points, apart, twiddles);
            else if (radix == 5) stage<5>(x, y, points, apart, twiddles);
            else any_stage(x, y, points, apart, radix, twiddles, roots);
            twiddles += 2 * points;
            roots += 2 * radix;
            points /= radix;
            apart *= radix;
            float* swapped = x;
            x = y;
            y = swapped;
        }
        for (int lane = 0; lane < lanes; ++lane)
            for (int64_t i = 0; i < stft.size; ++i)
                frames[(t + lane) * stft.size + i] = x[LANES * i + lane] * stft.window[i];
    }
}

}  // namespace mimo_fast::MIMO_FAST_SET
