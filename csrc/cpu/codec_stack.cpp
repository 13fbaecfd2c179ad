#include "codec_stack.h"

#include "activations.h"
#include "attend.h"
#include "dense_matmul.h"
#include "linear.h"

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

}  // namespace mimo_fast::MIMO_FAST_SET
