// Layer by layer, all rows at once. Where there is enough work the rows are divided among threads, each of which computes
// every layer of its rows; few rows stay on the caller's thread, but for `quantized_matmul` and `decode_attention`, where
// those find more threads worth while.

#include "transformer.h"

#include <omp.h>

#include "activations.h"
#include "attend.h"
#include "decode_attention.h"
#include "dense_matmul.h"
#include "linear.h"
#include "quantized_matmul.h"
#include "threads.h"

namespace mimo_fast::MIMO_FAST_SET {
namespace {

// Buffers of M rows, as wide as the widest layer.
struct Workspace {
    int64_t widest, gate;
    Buffer<float> normed, wide, attended, gated;

    Workspace(const Transformer& t, int64_t M)
        : widest(t.qkv_width()), gate(0), normed(M * t.dim), attended(M * t.heads * t.head_dim) {
        for (const Layer& layer : t.layers) {
            widest = most(widest, layer.gate_up.rows);
            gate = most(gate, layer.down.columns);
        }
        wide.reserve(M * widest);
        gated.reserve(M * gate);
    }
};

// The part of a workspace that belongs to some rows.
struct Space {
    float *normed, *wide, *gated;
};

// `multiply` of normed x.
void normed_product(const Linear& w, const float* norm, float eps, const float* x, int64_t M, float* y, Space& space) {
    if (w.only_quantized()) {
        QuantizedMatmul p = product(w, x, M, y);
        p.norm = norm;
        p.eps = eps;
        return quantized_matmul(p);
    }
    rms_norm(x, norm, eps, M, w.columns, space.normed);
    multiply(w, space.normed, M, y);
}

void gated_product(const Layer& layer, float eps, const float* x, int64_t M, Space& space) {
    if (layer.gate_up.only_quantized()) {
        QuantizedMatmul p = product(layer.gate_up, x, M, space.gated);
        p.norm = layer.ffn_norm;
        p.eps = eps;
        p.swiglu = true;
        return quantized_matmul(p);
    }
    normed_product(layer.gate_up, layer.ffn_norm, eps, x, M, space.wide, space);
    const int64_t half = layer.gate_up.rows / 2;
    for (int64_t m = 0; m < M; ++m)
        for (int64_t i = 0; i < half; i += 8) {
            const float* gate = space.wide + 2 * m * half + i;
            store(space.gated + m * half + i, silu(load(gate)) * load(gate + half));
        }
}

// All layers over rows first ... last - 1 of x, in place. attention: (layer, qkv of row 0, y of row 0, first, last).
template <class Attend>
void run_rows(const Transformer& t, float* x, int64_t first, int64_t last, Workspace& all, Attend& attention) {
    const int64_t M = last - first, width = t.heads * t.head_dim;
    // Rows of the widest buffer are as wide as a layer needs, so that a thread has its share of it alone.
    Space space{all.normed.data() + first * t.dim, all.wide.data() + first * all.widest,
                all.gated.data() + first * all.gate};
    x += first * t.dim;
    float* attended = all.attended.data() + first * width;
    for (size_t i = 0; i < t.layers.size(); ++i) {
        const Layer& layer = t.layers[i];
        normed_product(layer.qkv, layer.attention_norm, t.eps, x, M, space.wide, space);
        attention(int64_t(i), space.wide - first * t.qkv_width(), all.attended.data(), first, last);
        add_multiply(layer.out, attended, M, x, space.normed);
        gated_product(layer, t.eps, x, M, space);
        add_multiply(layer.down, space.gated, M, x, space.normed);
    }
    rms_norm(x, t.norm, t.eps, M, t.dim, x);
}

// All layers over `parts` times `length` rows of x, in place, by so many threads; each takes whole parts.
template <class Attend>
void run(const Transformer& t, float* x, int64_t parts, int64_t length, int threads, Attend attention) {
    Workspace all(t, parts * length);
    if (threads == 1) return run_rows(t, x, 0, parts * length, all, attention);
#pragma omp parallel num_threads(threads)
    {
        const int64_t count = omp_get_num_threads(), i = omp_get_thread_num();
        run_rows(t, x, parts * i / count * length, parts * (i + 1) / count * length, all, attention);
    }
}

// Whether two rows are of one slot.
bool share_a_slot(const Positions& at, int64_t slots) {
    Buffer<bool> seen(slots);
    for (int64_t r = 0; r < at.rows; ++r) {
        if (at.starts[r] < 0) continue;
        if (seen[at.slots[r]]) return true;
        seen[at.slots[r]] = true;
    }
    return false;
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
    const int threads = threads_for(at.rows, t.work());
    const bool together = threads > 1 && share_a_slot(at, cache.slots);
    run(t, y, at.rows, 1, threads, [&](int64_t layer, const float* qkv, float* attended, int64_t first, int64_t last) {
        DecodeAttention own = p;
        own.qkv = qkv;
        own.y = attended;
        own.cache.k = static_cast<float*>(cache.k) + layer * cache.layer_stride;
        own.cache.v = static_cast<float*>(cache.v) + layer * cache.layer_stride;
        if (threads == 1) return decode_attention(own);
        append_rows(own, first, last);
        // What rows of a slot attend to may be another thread's.
        if (together) {
#pragma omp barrier
        }
        attend_rows(own, first, last);
    });
}

void encode(const Transformer& t, const float* x, float* y, int64_t sequences, int64_t length, bool causal) {
    const int64_t width = t.qkv_width(), share = t.heads / t.kv_heads, dh = t.head_dim, half = dh / 2;
    if (x != y) std::memcpy(y, x, sequences * length * t.dim * sizeof(float));
    Buffer<int64_t> places(length);
    for (int64_t i = 0; i < length; ++i) places[i] = i;
    const int threads = threads_for(sequences, length * t.work());
    run(t, y, sequences, length, threads,
        [&](int64_t, float* qkv, float* attended, int64_t first, int64_t last) {
            Buffer<float> weights;
            for (int64_t m = first; m < last; ++m)
                for (int64_t h = 0; h < t.heads + t.kv_heads; ++h) {
                    const float* cosines = t.table + m % length * half;
                    rotate_head(qkv + m * width + h * dh, cosines, cosines + t.positions * half, half);
                }
            for (int64_t m = first; m < last; ++m)
                for (int64_t h = 0; h < t.heads; ++h) {
                    const float* k = qkv + m / length * length * width + (t.heads + h / share) * dh;
                    attend(qkv + m * width + h * dh, k, k + t.kv_heads * dh, places.data(),
                           causal ? m % length + 1 : length, width, dh, weights, attended + (m * t.heads + h) * dh);
                }
        });
}

}  // namespace mimo_fast::MIMO_FAST_SET
