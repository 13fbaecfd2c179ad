// A product of one row of x is bound by how fast weights come from the second or third cache: eight rows of W at once.
// For more rows a tile of ROWS rows of x and four of W keeps all its sums in registers, and is bound by the multipliers:
// 12 products for seven loads. The order of a sum is the same either way: eight sums over every eighth column, then
// `store_sums`.

#include "dense_matmul.h"

#include "simd.h"

namespace mimo_fast::MIMO_FAST_SET {
namespace {

// Rows of x of a tile, by the number of registers: sums, rows of x and a row of W.
#if defined(MIMO_FAST_AVX512)
constexpr int ROWS = 6;
#elif defined(MIMO_FAST_PORTABLE)
constexpr int ROWS = 2;
#else
constexpr int ROWS = 3;
#endif

// Bytes of W that stay in the first cache while all rows of x pass.
constexpr int64_t TILE = 1 << 14;

// R rows of x with N rows of W, a multiple of 4, from row n on.
template <int N, int R>
INLINE void dot(const Rows& w, const float* bias, const Rows& x, int64_t n, float* y, int64_t stride) {
    const float* weight = w.at(n);
    Floats sums[R][N];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < N; ++i) sums[r][i] = splat(0.0f);
    for (int64_t k = 0; k < x.columns; k += 8) {
        Floats wide[R];
        for (int r = 0; r < R; ++r) wide[r] = load(x.at(r) + k);
        for (int i = 0; i < N; ++i) {
            const Floats row = load(weight + i * w.stride + k);
            for (int r = 0; r < R; ++r) sums[r][i] = fma(row, wide[r], sums[r][i]);
        }
    }
    for (int r = 0; r < R; ++r) {
        float* out = y + r * stride + n;
        for (int i = 0; i < N; i += 4) store_sums(sums[r] + i, out + i);
        if (bias)
            for (int i = 0; i < N; ++i) out[i] += bias[n + i];
    }
}

// One row of W; its sum is in the order of `store_sums`.
INLINE float dot_one(const float* w, const float* x, int64_t columns, float bias) {
    Floats sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    for (int64_t k = 0; k < columns; k += 8) sums[0] = fma(load(w + k), load(x + k), sums[0]);
    float results[4];
    store_sums(sums, results);
    return results[0] + bias;
}

// R rows of x with rows first ... last - 1 of W.
template <int N, int R>
void dot_rows(
    const Rows& w, const float* bias, const Rows& x, int64_t first, int64_t last, float* y, int64_t stride
) {
    int64_t n = first;
    for (; n + N <= last; n += N) dot<N, R>(w, bias, x, n, y, stride);
    for (; n + 4 <= last; n += 4) dot<4, R>(w, bias, x, n, y, stride);
    for (; n < last; ++n)
        for (int r = 0; r < R; ++r)
            y[r * stride + n] = dot_one(w.at(n), x.at(r), x.columns, bias ? bias[n] : 0);
}

// `count` rows of x, at most R.
template <int R>
INLINE void dot_tile(
    const Rows& w, const float* bias, const Rows& x, int64_t count, int64_t first, int64_t last, float* y,
    int64_t stride
) {
    if constexpr (R > 1)
        if (count < R) return dot_tile<R - 1>(w, bias, x, count, first, last, y, stride);
    dot_rows<R == 1 ? 8 : 4, R>(w, bias, x, first, last, y, stride);
}

// Brings rows first ... last - 1 of W to the second cache, a part with each tile of x: weights of all layers are too many
// to stay there, and the third is far. Of one or two rows the time is that of reading W either way.
struct Prefetch {
    const char *at, *end;
    int64_t bytes;  // a step

    Prefetch(const Rows& w, int64_t first, int64_t last, int64_t M)
        : at(reinterpret_cast<const char*>(w.at(first))), end(at + (last - first) * w.stride * int64_t(sizeof(float))),
          bytes(M < 3 ? 0 : (end - at) / ((M + ROWS - 1) / ROWS) + LINE) {}

    void step() {
        for (const char* stop = at + bytes; at < stop && at < end; at += LINE) __builtin_prefetch(at, 0, 2);
    }

    static constexpr int64_t LINE = 64;
};

}  // namespace

void dense_matmul(const DenseBlock& w, int64_t columns, const float* x, int64_t M, float* y, int64_t stride) {
    strided_matmul({w.weight, columns, columns, w.rows}, w.bias, {x, columns, columns, M}, y, stride);
}

void strided_matmul(const Rows& w, const float* bias, const Rows& x, float* y, int64_t stride) {
    const int64_t tile = most(8, TILE / (x.columns * int64_t(sizeof(float))) / 8 * 8), M = x.count;
    for (int64_t first = 0; first < w.count; first += tile) {
        const int64_t last = least(first + tile, w.count);
        Prefetch next(w, last, least(last + tile, w.count), M);
        for (int64_t m = 0, rows; m < M; m += rows) {
            // With registers for many rows, tiles of nearly one height: 4 and 4 rather than 6 and 2.
            const int64_t left = M - m, tiles = (left + ROWS - 1) / ROWS;
            rows = ROWS > 3 ? (left + tiles - 1) / tiles : least(ROWS, left);
            next.step();
            dot_tile<ROWS>(w, bias, {x.at(m), x.stride, x.columns, rows}, rows, first, last, y + m * stride, stride);
        }
    }
}

void rms_norm(const float* x, const float* weight, float eps, int64_t M, int64_t K, float* y) {
    for (int64_t m = 0; m < M; ++m, x += K, y += K) {
        Floats squares = splat(0.0f);
        for (int64_t k = 0; k < K; k += 8) squares = fma(load(x + k), load(x + k), squares);
        const Floats scale = splat(1 / std::sqrt(sum(squares) / float(K) + eps));
        for (int64_t k = 0; k < K; k += 8) store(y + k, load(x + k) * scale * load(weight + k));
    }
}

void layer_norm(
    const float* x, const float* weight, const float* bias, float eps, int64_t M, int64_t K, float* y
) {
    for (int64_t m = 0; m < M; ++m, x += K, y += K) {
        Floats total = splat(0.0f), squares = splat(0.0f);
        for (int64_t k = 0; k < K; k += 8) total = total + load(x + k);
        const Floats mean = splat(sum(total) / float(K));
        for (int64_t k = 0; k < K; k += 8) {
            const Floats centred = load(x + k) - mean;
            squares = fma(centred, centred, squares);
        }
        const Floats scale = splat(1 / std::sqrt(sum(squares) / float(K) + eps));
        for (int64_t k = 0; k < K; k += 8) {
            const Floats normed = (load(x + k) - mean) * scale;
            store(y + k, fma(normed, load(weight + k), load(bias + k)));
        }
    }
}

}  // namespace mimo_fast::MIMO_FAST_SET
