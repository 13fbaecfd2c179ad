// Weights of a small model stay in the second or third cache, so a product is bound by how fast they come from there:
// eight rows of W at once for one row of x, four for two, each sum in a register of its own. The order of a sum is the
// same either way.

#include "dense_matmul.h"

#include <algorithm>

namespace mimo_fast {
namespace {

// Rows of W that stay in the first cache while all rows of x pass.
constexpr int64_t TILE = 16;

// The sums of four registers.
AVX2_INLINE __m128 sum4(const __m256* v) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

// R rows of x with N rows of W, a multiple of 4, from row n on.
template <int N, int R>
AVX2_INLINE void dot(const DenseBlock& w, int64_t columns, const float* x, int64_t n, float* y, int64_t stride) {
    const float* weight = w.weight + n * columns;
    __m256 sum[R][N] = {};
    for (int64_t k = 0; k < columns; k += 8) {
        __m256 wide[R];
        for (int r = 0; r < R; ++r) wide[r] = _mm256_loadu_ps(x + r * columns + k);
        for (int i = 0; i < N; ++i) {
            const __m256 row = _mm256_loadu_ps(weight + i * columns + k);
            for (int r = 0; r < R; ++r) sum[r][i] = _mm256_fmadd_ps(row, wide[r], sum[r][i]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < N; i += 4) {
            const __m128 bias = w.bias ? _mm_loadu_ps(w.bias + n + i) : _mm_setzero_ps();
            _mm_storeu_ps(y + r * stride + n + i, _mm_add_ps(sum4(sum[r] + i), bias));
        }
}

// One row of W; its sum is in the order of `sum4`.
AVX2_INLINE float dot_one(const DenseBlock& w, int64_t columns, const float* x, int64_t n) {
    __m256 sum[4] = {};
    for (int64_t k = 0; k < columns; k += 8)
        sum[0] = _mm256_fmadd_ps(_mm256_loadu_ps(w.weight + n * columns + k), _mm256_loadu_ps(x + k), sum[0]);
    return _mm_cvtss_f32(sum4(sum)) + (w.bias ? w.bias[n] : 0);
}

// R rows of x with rows first ... last - 1 of W.
template <int N, int R>
AVX2 void dot_rows(
    const DenseBlock& w, int64_t columns, const float* x, int64_t first, int64_t last, float* y, int64_t stride
) {
    int64_t n = first;
    for (; n + N <= last; n += N) dot<N, R>(w, columns, x, n, y, stride);
    for (; n + 4 <= last; n += 4) dot<4, R>(w, columns, x, n, y, stride);
    for (; n < last; ++n)
        for (int r = 0; r < R; ++r) y[r * stride + n] = dot_one(w, columns, x + r * columns, n);
}

}  // namespace

AVX2 void dense_matmul(const DenseBlock& w, int64_t columns, const float* x, int64_t M, float* y, int64_t stride) {
    for (int64_t first = 0; first < w.rows; first += TILE) {
        const int64_t last = std::min(first + TILE, w.rows);
        int64_t m = 0;
        for (; m + 2 <= M; m += 2) dot_rows<4, 2>(w, columns, x + m * columns, first, last, y + m * stride, stride);
        if (m < M) dot_rows<8, 1>(w, columns, x + m * columns, first, last, y + m * stride, stride);
    }
}

AVX2 void rms_norm(const float* x, const float* weight, float eps, int64_t M, int64_t K, float* y) {
    for (int64_t m = 0; m < M; ++m, x += K, y += K) {
        __m256 squares = _mm256_setzero_ps();
        for (int64_t k = 0; k < K; k += 8) {
            const __m256 value = _mm256_loadu_ps(x + k);
            squares = _mm256_fmadd_ps(value, value, squares);
        }
        const __m256 scale = _mm256_set1_ps(1 / std::sqrt(sum8(squares) / float(K) + eps));
        for (int64_t k = 0; k < K; k += 8)
            _mm256_storeu_ps(y + k, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + k), scale),
                                                  _mm256_loadu_ps(weight + k)));
    }
}

AVX2 void layer_norm(
    const float* x, const float* weight, const float* bias, float eps, int64_t M, int64_t K, float* y
) {
    for (int64_t m = 0; m < M; ++m, x += K, y += K) {
        __m256 sum = _mm256_setzero_ps(), squares = _mm256_setzero_ps();
        for (int64_t k = 0; k < K; k += 8) sum = _mm256_add_ps(sum, _mm256_loadu_ps(x + k));
        const __m256 mean = _mm256_set1_ps(sum8(sum) / float(K));
        for (int64_t k = 0; k < K; k += 8) {
            const __m256 centred = _mm256_sub_ps(_mm256_loadu_ps(x + k), mean);
            squares = _mm256_fmadd_ps(centred, centred, squares);
        }
        const __m256 scale = _mm256_set1_ps(1 / std::sqrt(sum8(squares) / float(K) + eps));
        for (int64_t k = 0; k < K; k += 8) {
            const __m256 normed = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + k), mean), scale);
            _mm256_storeu_ps(y + k, _mm256_fmadd_ps(normed, _mm256_loadu_ps(weight + k), _mm256_loadu_ps(bias + k)));
        }
    }
}

}  // namespace mimo_fast
