// Layer by layer, all rows at once. Nothing here wakes another thread but `quantized_matmul` and `decode_attention`,
// where those find it worth while.

#include "transformer.h"

#include <algorithm>
#include <numeric>

#include "attend.h"
#include "decode_attention.h"

namespace mimo_fast {
namespace {

// Buffers of M rows, as wide as the widest layer.
struct Workspace {
    std::vector<float> normed, wide, attended, gated;

    Workspace(const Transformer& t, int64_t M)
        : normed(M * t.dim), attended(M * t.heads * t.head_dim) {
        int64_t widest = t.qkv_width(), gate = 0;
        for (const Layer& layer : t.layers) {
            widest = std::max(widest, layer.gate_up.rows);
            gate = std::max(gate, layer.down.columns);
        }
        wide.resize(M * widest);
        gated.resize(M * gate);
    }
};

// y = normed x W^T + bias.
void normed_product(
    const Linear& w, const float* norm, float eps, const float* x, int64_t M, float* y, Workspace& space
) {
    if (w.blocks.empty()) {
        QuantizedMatmul p = w.quantized;
        p.x = x, p.y = y, p.norm = norm, p.eps = eps, p.M = M;
        return quantized_matmul(p);
    }
    rms_norm(x, norm, eps, M, w.columns, space.normed.data());
    multiply(w, space.normed.data(), M, y);
}

AVX2 void gated_product(const Layer& layer, float eps, const float* x, int64_t M, Workspace& space) {
    if (layer.gate_up.blocks.empty()) {
        QuantizedMatmul p = layer.gate_up.quantized;
        p.x = x, p.y = space.gated.data(), p.norm = layer.ffn_norm, p.eps = eps, p.M = M, p.swiglu = true;
        return quantized_matmul(p);
    }
    normed_product(layer.gate_up, layer.ffn_norm, eps, x, M, space.wide.data(), space);
    const int64_t half = layer.gate_up.rows / 2;
    for (int64_t m = 0; m < M; ++m)
        for (int64_t i = 0; i < half; i += 8) {
            const float* gate = &space.wide[2 * m * half + i];
            _mm256_storeu_ps(&space.gated[m * half + i],
                             _mm256_mul_ps(silu8(_mm256_loadu_ps(gate)), _mm256_loadu_ps(gate + half)));
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

void step(
    const Transformer& t, const float* x, float* y, const Cache& cache, const int64_t* slots, const int64_t* starts,
    int64_t rows
) {
    if (x != y) std::copy(x, x + rows * t.dim, y);
    run(t, y, rows, [&](int64_t layer, const float* qkv, float* attended) {
        decode_attention({qkv, t.table, cache.k + layer * cache.layer_stride, cache.v + layer * cache.layer_stride,
                          slots, starts, attended, Type::float32, rows, t.heads, t.kv_heads, t.head_dim, t.positions,
                          cache.capacity, t.qkv_width(), cache.slot_stride, cache.head_stride,
                          cache.position_stride});
    });
}

void encode(const Transformer& t, const float* x, float* y, int64_t sequences, int64_t length, bool causal) {
    const int64_t M = sequences * length, width = t.qkv_width(), share = t.heads / t.kv_heads, dh = t.head_dim;
    const int64_t half = dh / 2;
    if (x != y) std::copy(x, x + M * t.dim, y);
    std::vector<float> weights;
    run(t, y, M, [&](int64_t, float* qkv, float* attended) {
        for (int64_t m = 0; m < M; ++m)
            for (int64_t h = 0; h < t.heads + t.kv_heads; ++h) {
                const float* cosines = t.table + m % length * half;
                rotate_head(qkv + m * width + h * dh, cosines, cosines + t.positions * half, half);
            }
        for (int64_t m = 0; m < M; ++m) {
            std::vector<int64_t> places(causal ? m % length + 1 : length);
            std::iota(places.begin(), places.end(), 0);
            for (int64_t h = 0; h < t.heads; ++h) {
                const float* k = qkv + m / length * length * width + (t.heads + h / share) * dh;
                attend(qkv + m * width + h * dh, k, k + t.kv_heads * dh, places, width, dh, weights,
                       attended + (m * t.heads + h) * dh);
            }
        }
    });
}

}  // namespace mimo_fast
