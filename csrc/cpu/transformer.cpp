// Layer by layer, all rows at once. Nothing here wakes another thread but `quantized_matmul` and `decode_attention`,
// where those find it worth while.

#include "transformer.h"

#include "activations.h"
#include "attend.h"
#include "decode_attention.h"
#include "dense_matmul.h"
#include "linear.h"
#include "quantized_matmul.h"

namespace mimo_fast::MIMO_FAST_SET {
namespace {

// Buffers of M rows, as wide as the widest layer.
struct Workspace {
    Buffer<float> normed, wide, attended, gated;

    Workspace(const Transformer& t, int64_t M) : normed(M * t.dim), attended(M * t.heads * t.head_dim) {
        int64_t widest = t.qkv_width(), gate = 0;
        for (const Layer& layer : t.layers) {
            widest = most(widest, layer.gate_up.rows);
            gate = most(gate, layer.down.columns);
        }
        wide.reserve(M * widest);
        gated.reserve(M * gate);
    }
};

// y = normed x W^T + bias.
void normed_product(
    const Linear& w, const float* norm, float eps, const float* x, int64_t M, float* y, Workspace& space
) {
    if (w.blocks.empty()) {
        QuantizedMatmul p = product(w, x, M, y);
        p.norm = norm;
        p.eps = eps;
        return quantized_matmul(p);
    }
    rms_norm(x, norm, eps, M, w.columns, space.normed.data());
    multiply(w, space.normed.data(), M, y);
}

void gated_product(const Layer& layer, float eps, const float* x, int64_t M, Workspace& space) {
    if (layer.gate_up.blocks.empty()) {
        QuantizedMatmul p = product(layer.gate_up, x, M, space.gated.data());
        p.norm = layer.ffn_norm;
        p.eps = eps;
        p.swiglu = true;
        return quantized_matmul(p);
    }
    normed_product(layer.gate_up, layer.ffn_norm, eps, x, M, space.wide.data(), space);
    const int64_t half = layer.gate_up.rows / 2;
    for (int64_t m = 0; m < M; ++m)
        for (int64_t i = 0; i < half; i += 8) {
            const float* gate = space.wide.data() + 2 * m * half + i;
            store(space.gated.data() + m * half + i, silu(load(gate)) * load(gate + half));
        }
}

// All layers over M rows of x, in place. attention: (layer, qkv [M, ...], y [M, heads head_dim]).
template <class Attend>
void run(const Transformer& t, float* x, int64_t M, Attend attention) {
    Workspace space(t, M);
    for (size_t i = 0; i < t.layers.size(); ++i) {
        const Layer& layer = t.layers[i];
        normed_product(layer.qkv, layer.attention_norm, t.eps, x, M, space.wide.data(), space);
        attention(int64_t(i), space.wide.data(), space.attended.data());
        add_multiply(layer.out, space.attended.data(), M, x, space.normed.data());
        gated_product(layer, t.eps, x, M, space);
        add_multiply(layer.down, space.gated.data(), M, x, space.normed.data());
    }
    rms_norm(x, t.norm, t.eps, M, t.dim, x);
}

}  // namespace

void step(const Transformer& t, const float* x, float* y, const Cache& cache, const Positions& at) {
    if (x != y) std::memcpy(y, x, at.rows * t.dim * sizeof(float));
    DecodeAttention p;
    p.type = Type::float32;
    p.heads = t.heads;
    p.kv_heads = t.kv_heads;
    p.head_dim = t.head_dim;
    p.table = t.table;
    p.positions = t.positions;
    p.row_stride = t.qkv_width();
    p.cache = cache;
    p.at = at;
    run(t, y, at.rows, [&](int64_t layer, const float* qkv, float* attended) {
        p.qkv = qkv;
        p.y = attended;
        p.cache.k = static_cast<float*>(cache.k) + layer * cache.layer_stride;
        p.cache.v = static_cast<float*>(cache.v) + layer * cache.layer_stride;
        decode_attention(p);
    });
}

void encode(const Transformer& t, const float* x, float* y, int64_t sequences, int64_t length, bool causal) {
    const int64_t M = sequences * length, width = t.qkv_width(), share = t.heads / t.kv_heads, dh = t.head_dim;
    const int64_t half = dh / 2;
    if (x != y) std::memcpy(y, x, M * t.dim * sizeof(float));
    Buffer<float> weights;
    Buffer<int64_t> places(length);
    for (int64_t i = 0; i < length; ++i) places[i] = i;
    run(t, y, M, [&](int64_t, float* qkv, float* attended) {
        for (int64_t m = 0; m < M; ++m)
            for (int64_t h = 0; h < t.heads + t.kv_heads; ++h) {
                const float* cosines = t.table + m % length * half;
                rotate_head(qkv + m * width + h * dh, cosines, cosines + t.positions * half, half);
            }
        for (int64_t m = 0; m < M; ++m)
            for (int64_t h = 0; h < t.heads; ++h) {
                const float* k = qkv + m / length * length * width + (t.heads + h / share) * dh;
                attend(qkv + m * width + h * dh, k, k + t.kv_heads * dh, places.data(),
                       causal ? m % length + 1 : length, width, dh, weights, attended + (m * t.heads + h) * dh);
            }
    });
}

}  // namespace mimo_fast::MIMO_FAST_SET
