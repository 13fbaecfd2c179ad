#include "codec_tables.h"

#include <cmath>

namespace mimo_fast {
namespace {

constexpr double TURN = 6.283185307179586476925286766559;

void add_root(std::vector<float>& to, int64_t i, int64_t count) {
    const double angle = TURN * double(i % count) / double(count);
    to.push_back(float(std::cos(angle)));
    to.push_back(float(std::sin(angle)));
}

}  // namespace

Rotations make_rotations(const float* frequencies, int64_t half, int64_t count) {
    Rotations made;
    made.half = half;
    made.count = count;
    made.frequencies.assign(frequencies, frequencies + half);
    for (int64_t p = 0; p < count; ++p)
        for (int64_t i = 0; i < half; ++i) {
            made.cosines.push_back(std::cos(double(p) * made.frequencies[i]));
            made.sines.push_back(std::sin(double(p) * made.frequencies[i]));
        }
    return made;
}

InverseStft make_inverse_stft(const float* window, int64_t size, int64_t hop) {
    InverseStft made;
    made.size = size;
    made.hop = hop;
    for (int64_t i = 0; i < size; ++i) {
        made.window.push_back(window[i] / float(size));
        made.weights.push_back(window[i] * window[i]);
    }
    int64_t left = size / 2;
    for (int64_t k = 0; k < left; ++k) add_root(made.halves, k, size);
    while (left > 1) {
        int64_t radix = left % 4 ? 2 : 4;
        while (left % radix) ++radix;
        made.radices.push_back(radix);
        // Of a stage over `left` points: e^(2 pi i q j / left), q below left / radix, j below the radix.
        for (int64_t q = 0; q < left / radix; ++q)
            for (int64_t j = 0; j < radix; ++j) add_root(made.twiddles, q * j, left);
        for (int64_t i = 0; i < radix; ++i) add_root(made.roots, i, radix);
        left /= radix;
    }
    return made;
}

}  // namespace mimo_fast
