#include "patch_decoder.h"

#include <omp.h>

#include <cstring>

#include "buffer.h"
#include "dense_matmul.h"
#include "sampler.h"
#include "threads.h"
#include "transformer.h"

namespace mimo_fast::MIMO_FAST_SET {
namespace {

// Random slot of a patch's first frame; slot 0 is the text's.
constexpr uint32_t FRAME_SLOT = 1;

// Keys and values of one patch [layers, rows, kv_heads, steps, head_dim], and whose they are.
struct PatchCache {
    Buffer<float> k, v;
    Buffer<int64_t> slots, starts;
    Cache cache;

    PatchCache(const PatchDecoder& p, int64_t rows) : slots(rows), starts(rows) {
        const Transformer& t = p.transformer;
        const int64_t layers = int64_t(t.layers.size()), steps = int64_t(p.steps.size());
        const int64_t head = steps * t.head_dim, slot = t.kv_heads * head;
        k.reserve(layers * rows * slot);
        v.reserve(layers * rows * slot);
        for (int64_t r = 0; r < rows; ++r) {
            slots[r] = r;
            starts[r] = -1;
        }
        cache = {k.data(), v.data(), layers, rows, steps, rows * slot, slot, head, t.head_dim};
    }
};

// Draws head a of a step for every row, and adds the embeddings of what was drawn to the next input.
void draw_codes(
    const PatchDecoder& p, const CodeStep& step, int64_t a, const float* hidden, const SamplerRows& settings,
    Sampler& sampler, Buffer<float>& logits, int64_t* codes, float* next
) {
    const int64_t *heads = step.heads + a, n = step.active, dim = p.transformer.dim;
    const int64_t channel = heads[0], frame = heads[n], first = heads[2 * n], size = heads[3 * n], empty = heads[4 * n];
    logits.reserve(settings.rows * size);
    dense_matmul({p.heads + first * dim, nullptr, size}, dim, hidden, settings.rows, logits.data(), size);
    for (int64_t r = 0; r < settings.rows; ++r) {
        const int64_t code = sampler.draw(logits.data() + r * size, size, nullptr, empty, settings, r,
                                          FRAME_SLOT + uint32_t(frame), uint32_t(first));
        codes[(r * p.channels + channel) * p.group_size + frame] = code;
        // Without a code any row will do: the patch is not used.
        const float* row = p.embeddings + (first + (code == NOT_FINITE ? 0 : code)) * dim;
        for (int64_t i = 0; i < dim; ++i) next[r * dim + i] += row[i];
    }
}

// Settings of rows first ... last - 1.
SamplerRows part(const SamplerRows& s, int64_t first, int64_t last) {
    return {s.temperature + first, s.top_k + first, s.tail + first,   s.greedy + first,
            s.seeds + first,       s.draws + first, last - first};
}

// Every step of some rows, on this thread where they are few or others compute other rows.
void decode_rows(const PatchDecoder& p, const float* local, int64_t* codes, const SamplerRows& settings) {
    const int64_t rows = settings.rows, size = rows * p.transformer.dim;
    PatchCache cache(p, rows);
    Sampler sampler;
    Buffer<float> x(size), hidden(size), logits;
    std::memcpy(x.data(), local, size * sizeof(float));
    for (const CodeStep& each : p.steps) {
        for (int64_t& start : cache.starts) ++start;
        step(p.transformer, x.data(), hidden.data(), cache.cache, {cache.slots.data(), cache.starts.data(), rows});
        std::memset(x.data(), 0, size * sizeof(float));
        for (int64_t a = 0; a < each.active; ++a)
            draw_codes(p, each, a, hidden.data(), settings, sampler, logits, codes, x.data());
    }
}

}  // namespace

void decode_patch(const PatchDecoder& p, const float* local, int64_t* codes, const SamplerRows& settings) {
    const int64_t rows = settings.rows;
    const int threads = threads_for(rows, int64_t(p.steps.size()) * p.transformer.work());
    if (threads == 1) return decode_rows(p, local, codes, settings);
#pragma omp parallel num_threads(threads)
    {
        const int64_t count = omp_get_num_threads(), i = omp_get_thread_num();
        const int64_t first = rows * i / count, last = rows * (i + 1) / count;
        decode_rows(p, local + first * p.transformer.dim, codes + first * p.channels * p.group_size,
                    part(settings, first, last));
    }
}

}  // namespace mimo_fast::MIMO_FAST_SET
