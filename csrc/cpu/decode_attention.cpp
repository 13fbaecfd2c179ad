// One position of each row: the heads that share a key/value head are one task, so that a key is read from memory once.
//
// Rotation, scores, softmax and sums are float32; the new key and value are rounded to the cache's type before they are
// attended to, y is rounded once. Keys and values go by in blocks of BLOCK, widened once for all query heads of the
// task, which pass over a block while it is in the first cache; the softmax is rescaled where one holds a new maximum.

#include "decode_attention.h"

#include "activations.h"
#include "attend.h"
#include "buffer.h"
#include "dense_matmul.h"
#include "simd.h"

namespace mimo_fast::MIMO_FAST_SET {
namespace {

constexpr int64_t BLOCK = 32;
// Bytes of keys and values below which waking the other threads costs more than they bring.
constexpr int64_t SHARED = 1 << 17;

// A head at `head`, rotated to `position`, times `scale`.
INLINE void rotate(
    const DecodeAttention& p, const void* qkv, int64_t head, int64_t position, float scale, float* out
) {
    const int64_t half = p.head_dim / 2, at = head * p.head_dim;
    const float *cosines = p.table + position * half, *sines = cosines + p.positions * half;
    for (int64_t i = 0; i < half; ++i) {
        const float a = read(qkv, p.type, at + i), b = read(qkv, p.type, at + half + i);
        out[i] = (a * cosines[i] - b * sines[i]) * scale;
        out[half + i] = (b * cosines[i] + a * sines[i]) * scale;
    }
}

// Online softmax of the query heads of a task: scratch of a thread.
struct Heads {
    Buffer<float> q, sums, largest, weights;  // [heads, head_dim] twice, [heads] twice

    void begin(int64_t heads, int64_t head_dim) {
        q.reserve(heads * head_dim);
        sums.reserve(heads * head_dim);
        largest.reserve(heads);
        weights.reserve(heads);
        for (int64_t i = 0; i < heads * head_dim; ++i) sums[i] = 0;
        for (int64_t h = 0; h < heads; ++h) {
            largest[h] = -INFINITY;
            weights[h] = 0;
        }
    }
};

// A block of `count` keys and values in float32, `stride` apart, of R of the heads from h on.
template <int R>
void attend_block(Heads& heads, int64_t h, int64_t head_dim, const float* k, const float* v, int64_t count,
                  int64_t stride) {
    alignas(64) float scores[R * BLOCK];
    const int64_t rounded = (count + 7) / 8 * 8;
    strided_matmul({k, stride, head_dim, count}, nullptr, {&heads.q[h * head_dim], head_dim, head_dim, R}, scores, BLOCK);
    for (int r = 0; r < R; ++r) {
        float *row = scores + r * BLOCK, *sums = &heads.sums[(h + r) * head_dim];
        for (int64_t j = count; j < rounded; ++j) row[j] = -INFINITY;
        Floats wide = splat(heads.largest[h + r]);
        for (int64_t j = 0; j < rounded; j += 8) wide = max(load(row + j), wide);
        const float largest = MIMO_FAST_SET::largest(wide), kept = std::exp(heads.largest[h + r] - largest);
        Floats total = splat(0.0f);
        for (int64_t j = 0; j < rounded; j += 8) {
            const Floats weight = exp(load(row + j) - splat(largest));
            store(row + j, weight);
            total = total + weight;
        }
        heads.largest[h + r] = largest;
        heads.weights[h + r] = heads.weights[h + r] * kept + sum(total);
        for (int64_t i = 0; i < head_dim; i += 8) store(sums + i, load(sums + i) * splat(kept));
    }
    add_run<R>(scores, BLOCK, v, stride, count, head_dim, &heads.sums[h * head_dim], head_dim);
}

// A block of all heads of the task; how many are computed together changes no bits.
void attend_block(Heads& heads, int64_t share, int64_t head_dim, const float* k, const float* v, int64_t count,
                  int64_t stride) {
    int64_t h = 0;
    for (; h + 4 <= share; h += 4) attend_block<4>(heads, h, head_dim, k, v, count, stride);
    for (; h + 2 <= share; h += 2) attend_block<2>(heads, h, head_dim, k, v, count, stride);
    for (; h < share; ++h) attend_block<1>(heads, h, head_dim, k, v, count, stride);
}

// `count` heads that begin at `from`, a position apart.
void widen_heads(const DecodeAttention& p, const char* from, int64_t count, float* out) {
    for (int64_t j = 0; j < count; ++j)
        for (int64_t i = 0; i < p.head_dim; i += 8)
            store(out + j * p.head_dim + i, read8(from, p.type, j * p.cache.position_stride + i));
}

// A row and a key/value head.
struct Place {
    const char* qkv;  // of the row
    char *k, *v;      // of its slot and the head
    int64_t position;
    bool exists;

    Place(const DecodeAttention& p, int64_t r, int64_t g) : position(p.at.starts[r]) {
        const int64_t size = size_of(p.type);
        exists = position >= 0 && position < least(p.positions, p.cache.capacity);
        qkv = static_cast<const char*>(p.qkv) + r * p.row_stride * size;
        const int64_t first = exists ? (p.at.slots[r] * p.cache.slot_stride + g * p.cache.head_stride) * size : 0;
        k = static_cast<char*>(p.cache.k) + first;
        v = static_cast<char*>(p.cache.v) + first;
    }
};

void append_row(const DecodeAttention& p, int64_t r, int64_t g, Buffer<float>& key) {
    const Place at(p, r, g);
    if (!at.exists) return;
    const int64_t place = at.position * p.cache.position_stride, value = (p.heads + p.kv_heads + g) * p.head_dim;
    rotate(p, at.qkv, p.heads + g, at.position, 1, key.data());
    for (int64_t i = 0; i < p.head_dim; ++i) {
        write(at.k, p.type, place + i, key[i]);
        write(at.v, p.type, place + i, read(at.qkv, p.type, value + i));
    }
}

// Row r, key/value head g and the query heads that read it.
void attend_row(const DecodeAttention& p, int64_t r, int64_t g) {
    const Place at(p, r, g);
    const Cache& cache = p.cache;
    const int64_t share = p.heads / p.kv_heads, size = size_of(p.type), position = at.position;
    const char *qkv = at.qkv, *k = at.k, *v = at.v;
    char* y = static_cast<char*>(p.y) + (r * p.heads + g * share) * p.head_dim * size;
    if (!at.exists) {
        std::memset(y, 0, share * p.head_dim * size);
        return;
    }
    static thread_local Heads heads;
    static thread_local Buffer<float> keys, values;
    heads.begin(share, p.head_dim);
    const float scale = 1 / std::sqrt(float(p.head_dim));
    for (int64_t h = 0; h < share; ++h) rotate(p, qkv, g * share + h, position, scale, &heads.q[h * p.head_dim]);
    keys.reserve(BLOCK * p.head_dim);
    values.reserve(BLOCK * p.head_dim);
    for (int64_t j = 0; j <= position; j += BLOCK) {
        const int64_t count = least(BLOCK, position + 1 - j), from = j * cache.position_stride * size;
        if (p.type == Type::float32) {
            const auto *key = reinterpret_cast<const float*>(k + from), *value = reinterpret_cast<const float*>(v + from);
            attend_block(heads, share, p.head_dim, key, value, count, cache.position_stride);
            continue;
        }
        widen_heads(p, k + from, count, keys.data());
        widen_heads(p, v + from, count, values.data());
        attend_block(heads, share, p.head_dim, keys.data(), values.data(), count, p.head_dim);
    }
    for (int64_t h = 0; h < share; ++h)
        for (int64_t i = 0; i < p.head_dim; ++i)
            write(y, p.type, h * p.head_dim + i, heads.sums[h * p.head_dim + i] / heads.weights[h]);
}

}  // namespace

void append_rows(const DecodeAttention& p, int64_t first, int64_t last) {
    Buffer<float> key(p.head_dim);
    for (int64_t r = first; r < last; ++r)
        for (int64_t g = 0; g < p.kv_heads; ++g) append_row(p, r, g, key);
}

void attend_rows(const DecodeAttention& p, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
        for (int64_t g = 0; g < p.kv_heads; ++g) attend_row(p, r, g);
}

void decode_attention(const DecodeAttention& p) {
    append_rows(p, 0, p.at.rows);
    int64_t positions = 0;
    for (int64_t r = 0; r < p.at.rows; ++r) positions += most(0, p.at.starts[r] + 1);
    const int64_t bytes = positions * p.kv_heads * p.head_dim * 2 * size_of(p.type);
#pragma omp parallel for collapse(2) schedule(dynamic) if (bytes > SHARED)
    for (int64_t r = 0; r < p.at.rows; ++r)
        for (int64_t g = 0; g < p.kv_heads; ++g) attend_row(p, r, g);
}

}  // namespace mimo_fast::MIMO_FAST_SET
