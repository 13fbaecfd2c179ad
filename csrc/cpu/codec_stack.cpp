#include "codec_stack.h"

#include <omp.h>

#include "activations.h"
#include "attend.h"
#include "dense_matmul.h"
#include "linear.h"
#include "threads.h"

namespace mimo_fast::MIMO_FAST_SET {
namespace {

// Places that each row sees.
struct Seen {
    Buffer<int64_t> places, counts;  // [T, a.places], of which row t sees the first counts[t]

    Seen(const CodecAttention& a, int64_t T) : places(T * a.places), counts(T) {
        for (int64_t t = 0; t < T; ++t)
            for (int64_t s = 0; s < a.places; ++s)
                if (a.visible[t * a.places + s]) places[t * a.places + counts[t]++] = s;
    }
};

// Rotates queries and keys of qkv [T, 3 dim] and stores keys and values at k and v, a layer's part of the buffer.
void append(const CodecStack& stack, const CodecAttention& a, float* qkv, int64_t T, float* k, float* v) {
    const int64_t dim = stack.dim, dh = dim / stack.heads, half = dh / 2;
    for (int64_t t = 0; t < T; ++t) {
        float* row = qkv + t * 3 * dim;
        const float *cosines = a.table + t * half, *sines = cosines + T * half;
        for (int64_t h = 0; h < 2 * stack.heads; ++h) rotate_head(row + h * dh, cosines, sines, half);
        for (int64_t h = 0; h < stack.heads; ++h) {
            const int64_t at = (h * a.places + a.slots[t]) * dh;
            std::memcpy(k + at, row + dim + h * dh, dh * sizeof(float));
            std::memcpy(v + at, row + 2 * dim + h * dh, dh * sizeof(float));
        }
    }
}

void gelu(float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += 8) store(x + i, gelu(load(x + i)));
}

// Rows that pass a layer's products at once: what lies between two products stays in the second cache.
constexpr int64_t BLOCK_ROWS = 128;

// The first row of part i of n. Queries that are attended together are never of two parts.
int64_t part_begin(const CodecSequences& s, int64_t rows, int64_t i, int64_t n) {
    const int64_t row = rows * i / n;
    int64_t start = 0;
    for (int64_t j = 0; j < s.count && start + s.lengths[j] <= row; ++j) start += s.lengths[j];
    return start + (row - start) / TOGETHER * TOGETHER;
}

// Rows first ... last - 1 of all sequences, which one thread computes.
struct Part {
    const CodecStack& stack;
    const CodecSequences& sequences;
    const int64_t rows, first, last;  // `rows` of all sequences
    Buffer<float> normed, qkv, attended, wide, scratch;
    Buffer<int64_t> from, to;

    Part(const CodecStack& stack, const CodecSequences& s, int64_t rows, int64_t first, int64_t last)
        : stack(stack), sequences(s), rows(rows), first(first), last(last), normed(least(BLOCK_ROWS, last - first) * stack.dim),
          qkv((last - first) * 3 * stack.dim), attended((last - first) * stack.dim) {}

    // Queries of this part, rotated; its keys and values [heads, rows, head_dim] go where all parts read them.
    void project(const CodecLayer& layer, const float* x, float* k, float* v) {
        const int64_t dim = stack.dim, dh = dim / stack.heads, half = dh / 2;
        for (int64_t row = first; row < last; row += BLOCK_ROWS) {
            const int64_t count = least(BLOCK_ROWS, last - row);
            apply_norm(layer.attention_norm, stack.eps, x + row * dim, count, dim, normed.data());
            multiply(layer.qkv, normed.data(), count, qkv.data() + (row - first) * 3 * dim);
        }
        for (int64_t row = first; row < last; ++row) {
            float* of = qkv.data() + (row - first) * 3 * dim;
            const float *cosines = sequences.table + row * half, *sines = cosines + rows * half;
            for (int64_t h = 0; h < 2 * stack.heads; ++h) rotate_head(of + h * dh, cosines, sines, half);
            for (int64_t h = 0; h < stack.heads; ++h) {
                std::memcpy(k + (h * rows + row) * dh, of + dim + h * dh, dh * sizeof(float));
                std::memcpy(v + (h * rows + row) * dh, of + 2 * dim + h * dh, dh * sizeof(float));
            }
        }
    }

    void attend(const float* k, const float* v) {
        const int64_t dim = stack.dim, dh = dim / stack.heads;
        for (int64_t i = 0, start = 0; i < sequences.count; start += sequences.lengths[i++]) {
            const int64_t length = sequences.lengths[i], begin = most(start, first);
            const int64_t count = least(start + length, last) - begin;
            if (count <= 0) continue;
            from.reserve(count);
            to.reserve(count);
            for (int64_t t = 0; t < count; ++t) {
                const int64_t position = begin - start + t;
                from[t] = most(0, position - sequences.left);
                to[t] = least(length, position + sequences.right + 1);
            }
            for (int64_t h = 0; h < stack.heads; ++h) {
                const int64_t at = (h * rows + start) * dh;
                const Run runs[2] = {{k + at, v + at, dh, length}, {k + at, v + at, dh, 0}};
                attend_runs(qkv.data() + (begin - first) * 3 * dim + h * dh, 3 * dim, count, runs, from.data(), to.data(),
                            dh, scratch, attended.data() + (begin - first) * dim + h * dh, dim);
            }
        }
    }

    void finish(const CodecLayer& layer, float* x) {
        const int64_t dim = stack.dim;
        for (int64_t row = first; row < last; row += BLOCK_ROWS)
            finish_layer(stack, layer, attended.data() + (row - first) * dim, least(BLOCK_ROWS, last - row),
                         x + row * dim, normed.data(), wide);
    }
};

}  // namespace

void apply_norm(const Norm& norm, float eps, const float* x, int64_t T, int64_t dim, float* y) {
    if (norm.bias) layer_norm(x, norm.weight, norm.bias, eps, T, dim, y);
    else rms_norm(x, norm.weight, eps, T, dim, y);
}

void finish_layer(const CodecStack& stack, const CodecLayer& layer, const float* attended, int64_t T, float* x,
                  float* normed, Buffer<float>& wide) {
    add_multiply(layer.out, attended, T, x, normed);
    apply_norm(layer.ffn_norm, stack.eps, x, T, stack.dim, normed);
    wide.reserve(T * layer.up.rows);
    multiply(layer.up, normed, T, wide.data());
    gelu(wide.data(), T * layer.up.rows);
    add_multiply(layer.down, wide.data(), T, x, normed);
}

void run_codec_stack(const CodecStack& stack, float* x, int64_t T, const CodecAttention& a) {
    const int64_t dim = stack.dim, dh = dim / stack.heads, layer_size = stack.heads * a.places * dh;
    const Seen seen(a, T);
    Buffer<float> normed(T * dim), qkv(T * 3 * dim), attended(T * dim), wide, weights;
    for (size_t i = 0; i < stack.layers.size(); ++i) {
        const CodecLayer& layer = stack.layers[i];
        float *k = a.k + int64_t(i) * layer_size, *v = a.v + int64_t(i) * layer_size;
        apply_norm(layer.attention_norm, stack.eps, x, T, dim, normed.data());
        multiply(layer.qkv, normed.data(), T, qkv.data());
        append(stack, a, qkv.data(), T, k, v);
        for (int64_t h = 0; h < stack.heads; ++h)
            for (int64_t t = 0; t < T; ++t)
                attend(qkv.data() + t * 3 * dim + h * dh, k + h * a.places * dh, v + h * a.places * dh,
                       seen.places.data() + t * a.places, seen.counts[t], dh, dh, weights,
                       attended.data() + t * dim + h * dh);
        finish_layer(stack, layer, attended.data(), T, x, normed.data(), wide);
    }
}

int64_t stack_work(const CodecStack& stack) {
    int64_t total = 0;
    for (const CodecLayer& layer : stack.layers)
        total += layer.qkv.size() + layer.out.size() + layer.up.size() + layer.down.size();
    return total;
}

void run_codec_sequences(const CodecStack& stack, float* x, const CodecSequences& sequences, int64_t skip) {
    const int64_t dim = stack.dim;
    int64_t rows = 0;
    for (int64_t i = 0; i < sequences.count; ++i) rows += sequences.lengths[i];
    // Keys and values of two layers in turn: a thread may begin a layer while others still read those of the last one.
    Buffer<float> keys(2 * rows * dim), values(2 * rows * dim);
    const int threads = threads_for(rows, stack_work(stack));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t count = omp_get_num_threads(), i = omp_get_thread_num();
        const int64_t first = part_begin(sequences, rows, i, count);
        const int64_t last = i + 1 < count ? part_begin(sequences, rows, i + 1, count) : rows;
        Part part(stack, sequences, rows, first, last);
        Buffer<float> skipped(skip ? (last - first) * dim : 0);
        for (size_t l = 0; l < stack.layers.size(); ++l) {
            float *k = keys.data() + int64_t(l % 2) * rows * dim, *v = values.data() + int64_t(l % 2) * rows * dim;
            part.project(stack.layers[l], x, k, v);
#pragma omp barrier
            part.attend(k, v);
            part.finish(stack.layers[l], x);
            if (int64_t(l) + 1 == skip) std::memcpy(skipped.data(), x + first * dim, skipped.size() * sizeof(float));
        }
        for (int64_t j = 0; j < skipped.size(); ++j) x[first * dim + j] += skipped[j];
    }
}

}  // namespace mimo_fast::MIMO_FAST_SET
