// One position of each row: the heads that share a key/value head are one task, so that a key is read from memory once.
//
// Rotation, scores, softmax and sums are float32; the new key and value are rounded to the cache's type before they are
// attended to, y is rounded once. Keys and values go by in blocks of BLOCK, widened once for all query heads of the
// task, which pass over a block while it is in the first cache; the softmax is rescaled where one holds a new maximum.

#include "decode_attention.h"

#include "buffer.h"
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

// Online softmax of one query head.
struct Head {
    Buffer<float> q, sum;
    float largest = -INFINITY, weight = 0;
};

// A block of `count` keys and values in float32, `stride` apart.
void attend_block(int64_t head_dim, Head& head, const float* k, const float* v, int64_t count, int64_t stride) {
    float scores[BLOCK], largest = head.largest;
    // Four keys at once: one sum would wait for itself. In place of those beyond the last it is the last, and not used.
    for (int64_t j = 0; j < count; j += 4) {
        Floats sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
        const float* keys[4];
        for (int n = 0; n < 4; ++n) keys[n] = k + least(j + n, count - 1) * stride;
        for (int64_t i = 0; i < head_dim; i += 8) {
            const Floats q = load(head.q.data() + i);
            for (int n = 0; n < 4; ++n) sums[n] = fma(load(keys[n] + i), q, sums[n]);
        }
        for (int n = 0; n < 4; ++n) scores[j + n] = sum(sums[n]);
    }
    for (int64_t j = 0; j < count; ++j) largest = scores[j] > largest ? scores[j] : largest;
    const float kept = std::exp(head.largest - largest);
    head.largest = largest;
    head.weight *= kept;
    for (int64_t j = 0; j < count; ++j) head.weight += scores[j] = std::exp(scores[j] - largest);
    for (int64_t i = 0; i < head_dim; i += 8) {
        Floats total = load(head.sum.data() + i) * splat(kept);
        for (int64_t j = 0; j < count; ++j) total = fma(load(v + j * stride + i), splat(scores[j]), total);
        store(head.sum.data() + i, total);
    }
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
    Buffer<Head> heads(share);
    const float scale = 1 / std::sqrt(float(p.head_dim));
    for (int64_t h = 0; h < share; ++h) {
        heads[h].q.reserve(p.head_dim);
        heads[h].sum.reserve(p.head_dim);
        rotate(p, qkv, g * share + h, position, scale, heads[h].q.data());
    }
    static thread_local Buffer<float> keys, values;
    keys.reserve(BLOCK * p.head_dim);
    values.reserve(BLOCK * p.head_dim);
    for (int64_t j = 0; j <= position; j += BLOCK) {
        const int64_t count = least(BLOCK, position + 1 - j), from = j * cache.position_stride * size;
        if (p.type == Type::float32) {
            const auto *key = reinterpret_cast<const float*>(k + from), *value = reinterpret_cast<const float*>(v + from);
            for (Head& head : heads) attend_block(p.head_dim, head, key, value, count, cache.position_stride);
            continue;
        }
        widen_heads(p, k + from, count, keys.data());
        widen_heads(p, v + from, count, values.data());
        for (Head& head : heads) attend_block(p.head_dim, head, keys.data(), values.data(), count, p.head_dim);
    }
    for (int64_t h = 0; h < share; ++h)
        for (int64_t i = 0; i < p.head_dim; ++i)
            write(y, p.type, h * p.head_dim + i, heads[h].sum[i] / heads[h].weight);
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
