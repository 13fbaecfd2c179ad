// Layer by layer, all rows at once. Nothing here wakes another thread but `quantized_matmul` and `decode_attention`,
// where those find it worth while.

#include "transformer.h"

#include <algorithm>

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

void multiply(const Linear& w, const float* x, int64_t M, float* y) {
    int64_t at = 0;
    for (const DenseBlock& block : w.blocks) {
        dense_matmul(block, w.columns, x, M, y + at, w.rows);
        at += block.rows;
    }
}

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

// x += y W^T + bias.
void add_product(const Linear& w, const float* y, int64_t M, float* x, Workspace& space) {
    if (w.blocks.empty()) {
        QuantizedMatmul p = w.quantized;
        p.x = y, p.y = x, p.residual = x, p.M = M;
        return quantized_matmul(p);
    }
    multiply(w, y, M, space.normed.data());
    for (int64_t i = 0; i < M * w.rows; ++i) x[i] += space.normed[i];
}

void gated_product(const Layer& layer, float eps, const float* x, int64_t M, Workspace& space) {
    if (layer.gate_up.blocks.empty()) {
        QuantizedMatmul p = layer.gate_up.quantized;
        p.x = x, p.y = space.gated.data(), p.norm = layer.ffn_norm, p.eps = eps, p.M = M, p.swiglu = true;
        return quantized_matmul(p);
    }
    normed_product(layer.gate_up, layer.ffn_norm, eps, x, M, space.wide.data(), space);
    const int64_t half = layer.gate_up.rows / 2;
    for (int64_t m = 0; m < M; ++m)
        for (int64_t i = 0; i < half; ++i) {
            const float gate = space.wide[2 * m * half + i];
            space.gated[m * half + i] = gate / (1 + std::exp(-gate)) * space.wide[(2 * m + 1) * half + i];
        }
}

// All layers over M rows of x, in place. attend: (layer, qkv [M, ...], y [M, heads head_dim]).
template <class Attend>
void run(const Transformer& t, float* x, int64_t M, Attend attend) {
    Workspace space(t, M);
    for (size_t i = 0; i < t.layers.size(); ++i) {
        const Layer& layer = t.layers[i];
        normed_product(layer.qkv, layer.attention_norm, t.eps, x, M, space.wide.data(), space);
        attend(int64_t(i), space.wide.data(), space.attended.data());
        add_product(layer.out, space.attended.data(), M, x, space);
        gated_product(layer, t.eps, x, M, space);
        add_product(layer.down, space.gated.data(), M, x, space);
    }
    rms_norm(x, t.norm, t.eps, M, t.dim, x);
}

// The head at x, rotated to a position.
void rotate(const Transformer& t, float* x, int64_t position) {
    const int64_t half = t.head_dim / 2;
    const float *cosines = t.table + position * half, *sines = cosines + t.positions * half;
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cosines[i] - b * sines[i];
        x[half + i] = b * cosines[i] + a * sines[i];
    }
}

// One query at q over `count` keys and values, `stride` apart.
AVX2 void attend_one(
    const float* q, const float* k, const float* v, int64_t count, int64_t stride, int64_t head_dim, float* y
) {
    std::vector<float> weights(count);
    float largest = -INFINITY, total = 0;
    for (int64_t j = 0; j < count; ++j) {
        __m256 sum = _mm256_setzero_ps();
        for (int64_t i = 0; i < head_dim; i += 8)
            sum = _mm256_fmadd_ps(_mm256_loadu_ps(q + i), _mm256_loadu_ps(k + j * stride + i), sum);
        weights[j] = sum8(sum) / std::sqrt(float(head_dim));
        largest = std::max(largest, weights[j]);
    }
    for (float& weight : weights) total += weight = std::exp(weight - largest);
    for (int64_t i = 0; i < head_dim; i += 8) {
        __m256 sum = _mm256_setzero_ps();
        for (int64_t j = 0; j < count; ++j)
            sum = _mm256_fmadd_ps(_mm256_set1_ps(weights[j] / total), _mm256_loadu_ps(v + j * stride + i), sum);
        _mm256_storeu_ps(y + i, sum);
    }
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
    const int64_t M = sequences * length, width = t.qkv_width(), share = t.heads / t.kv_heads;
    if (x != y) std::copy(x, x + M * t.dim, y);
    run(t, y, M, [&](int64_t, float* qkv, float* attended) {
        for (int64_t m = 0; m < M; ++m)
            for (int64_t h = 0; h < t.heads + t.kv_heads; ++h) rotate(t, qkv + m * width + h * t.head_dim, m % length);
        for (int64_t m = 0; m < M; ++m)
            for (int64_t h = 0; h < t.heads; ++h) {
                const float* k = qkv + m / length * length * width + (t.heads + h / share) * t.head_dim;
                attend_one(qkv + m * width + h * t.head_dim, k, k + t.kv_heads * t.head_dim,
                           causal ? m % length + 1 : length, width, t.head_dim,
                           attended + (m * t.heads + h) * t.head_dim);
            }
    });
}

}  // namespace mimo_fast
