// The vocoder's layers: many rows, which attend to those near them.
//
// Rows of a stream are divided into groups of up to 32 neighbours. A group has its own blocks, its own vectors, and goes
// through the table as if it were alone: a grid [blocks of a group, groups], in which each block has a `Program` with the
// group's rows and places. So weights are read once for a group, all but the first time from L2. Groups meet in attention
// only: keys and values of rows on either side are waited for where their group makes them.
//
// A row sees `context` rows before it and `ahead` after it. Before the first row there are `context` kept keys and values,
// rotated; the same of what follows `fresh` rows later is written to `kept_keys` and `kept_values`. Rows before frame 0 see
// one another only, and no other row sees them.
#pragma once

#include "codec.cuh"

namespace {

constexpr int FRAME_HEAD = 16;  // values of a head

// Bytes of x's place that ATTEND_FRAMES takes, for groups of so many rows: q, keys, values, scores, their sums.
__host__ __device__ inline int frames_bytes(int rows, int context, int ahead) {
    const int window = context + ahead + 1;
    return 4 * (rows * FRAME_HEAD + 2 * (rows + context + ahead) * FRAME_HEAD + rows * window + rows);
}

// What a group of rows is told, in shared memory: the rows and places of its own.
template <class T, int DEPTH>
__device__ const Program& Engine<T, DEPTH>::of_group(const Program& all, const Places& places) {
    Program& own = *at<Program>(places.program);
    for (int i = threadIdx.x; i < int(sizeof(Program) / 4); i += blockDim.x)
        reinterpret_cast<uint32_t*>(&own)[i] = reinterpret_cast<const uint32_t*>(&all)[i];
    __syncthreads();
    const int group = blockIdx.y, first = group % all.stream_groups * all.rows;
    const int row = group / all.stream_groups * all.stream_rows + first, left = all.stream_rows - first;
    if (threadIdx.x == 0) {
        own.rows = left < all.rows ? left : all.rows;
        own.exchanged = all.exchanged + group * all.group_values;
    }
    // All are of one width.
    for (int i = threadIdx.x; i < POINTERS; i += blockDim.x)
        own.pointers[i] = static_cast<uint16_t*>(all.pointers[i]) + int64_t(row) * all.pointer_columns;
    __syncthreads();
    return own;
}

template <class T, int DEPTH>
__device__ __forceinline__ bool Engine<T, DEPTH>::attend_frames(const Phase& phase) {
    constexpr int HALF_HEAD = FRAME_HEAD / 2, QUADS = HALF_HEAD / 4;
    const int stream = blockIdx.y / p.stream_groups, first = blockIdx.y % p.stream_groups * p.group_rows;
    const int length = p.stream_rows, near = rows + p.context + p.ahead, window = p.context + p.ahead + 1;
    const int64_t position = p.starts[stream];  // of the stream's first row
    // Keys and values: row n is that of row first - context + n of the stream.
    float* const q = reinterpret_cast<float*>(x());
    float* const k = q + rows * FRAME_HEAD;
    float* const v = k + near * FRAME_HEAD;
    float* const scores = v + near * FRAME_HEAD;  // [row, window]
    float* const totals = scores + rows * window;
    // Where row `row` of the stream has its q, k and v.
    const auto made = [&](int row) {
        const int apart = row / p.group_rows - first / p.group_rows, begin = row / p.group_rows * p.group_rows;
        const int others = length - begin < p.group_rows ? length - begin : p.group_rows;
        return p.exchanged + apart * p.group_values + int64_t(phase.from) * others + int64_t(row - begin) * phase.columns;
    };
#pragma unroll 1
    for (int head = blockIdx.x; head < p.heads; head += blocks) {
        const int64_t base = phase.layer * p.layer_stride + p.slots[stream] * p.slot_stride + head * p.head_stride;
        // Rows of q, then of k, then of v.
        for (int i = threadIdx.x; i < (rows + 2 * near) * QUADS; i += blockDim.x) {
            const int line = i / QUADS, d = i % QUADS * 4, part = line < rows ? 0 : line < rows + near ? 1 : 2;
            const int row = first + (part ? (line - rows) % near - p.context : line);
            float* const to = q + line * FRAME_HEAD + d;
            uint2 low = make_uint2(0, 0), high = low;
            if (row < 0) {
                const uint16_t* const from = (part == 1 ? p.keys : p.values) + base + (row + p.context) * FRAME_HEAD + d;
                low = *reinterpret_cast<const uint2*>(from);
                high = *reinterpret_cast<const uint2*>(from + HALF_HEAD);
            } else if (row < length) {
                const uint16_t* const from = made(row) + (part * p.heads + head) * FRAME_HEAD + d;
                wait_for(from, from + HALF_HEAD, low, high);
            }
            const bool turns = part < 2 && row >= 0 && row < length;
            const float* const angle = p.rope + (int64_t(stream) * length + row) * HALF_HEAD + d;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float one = value_of(low, e), other = value_of(high, e);
                if (turns) {
                    const float cosine = angle[e], sine = angle[p.positions * HALF_HEAD + e];
                    const float a = add(mul(one, cosine), -mul(other, sine)), b = add(mul(other, cosine), mul(one, sine));
                    one = widen<T>(narrow<T>(a)), other = widen<T>(narrow<T>(b));
                }
                to[e] = one, to[e + HALF_HEAD] = other;
            }
        }
        if (!together()) return false;
        for (int i = threadIdx.x; i < rows * window; i += blockDim.x) {
            const int m = i / window, n = m + i % window, row = first + n - p.context;
            const bool seen = row < length && (position + row >= 0) == (position + first + m >= 0);
            float score = 0;
#pragma unroll
            for (int d = 0; d < FRAME_HEAD; ++d) score = fmaf(q[m * FRAME_HEAD + d], k[n * FRAME_HEAD + d], score);
            scores[i] = seen ? score * 0.25f : -INFINITY;  // 1 / sqrt(FRAME_HEAD)
        }
        __syncthreads();
        for (int m = warp; m < rows; m += warps) {
            float* const own = scores + m * window;
            float most = -INFINITY, all = 0;
            for (int j = lane; j < window; j += 32) most = fmaxf(most, own[j]);
#pragma unroll
            for (int mask = 1; mask < 32; mask *= 2) most = fmaxf(most, shfl_xor(most, mask));
            for (int j = lane; j < window; j += 32) {
                const float weight = fast_exp(own[j] - most);
                own[j] = weight, all += weight;
            }
#pragma unroll
            for (int mask = 1; mask < 32; mask *= 2) all += shfl_xor(all, mask);
            if (lane == 0) totals[m] = all;
        }
        __syncthreads();
        uint16_t* const to = to_of(phase) + head * FRAME_HEAD;
#pragma unroll 1
        for (int begin = warp * 32; begin < rows * FRAME_HEAD; begin += warps * 32) {
            const bool real = begin + lane < rows * FRAME_HEAD;
            const int m = real ? (begin + lane) / FRAME_HEAD : 0, d = lane % FRAME_HEAD;
            float sum = 0;
#pragma unroll 4
            for (int j = 0; j < window; ++j) sum = fmaf(scores[m * window + j], v[(m + j) * FRAME_HEAD + d], sum);
            put_four(to + int64_t(m) * phase.width + d, narrow<T>(fast_divide(sum, totals[m])), real);
        }
        // A group keeps its own rows, the first one those that were kept before, too.
        const int64_t kept = ((int64_t(stream) * p.layers + phase.layer) * p.heads + head) * p.context;
        for (int i = threadIdx.x; i < 2 * p.context * FRAME_HEAD; i += blockDim.x) {
            const int place = i / FRAME_HEAD % p.context, d = i % FRAME_HEAD, row = place + p.fresh - p.context;
            if (row >= first + rows || (row < first && (first || row < -p.context))) continue;
            const bool values = i >= p.context * FRAME_HEAD;
            (values ? p.kept_values : p.kept_keys)[(kept + place) * FRAME_HEAD + d] =
                narrow<T>((values ? v : k)[(row - first + p.context) * FRAME_HEAD + d]);
        }
        // The next head's q takes their place.
        __syncthreads();
    }
    return together();
}

}  // namespace
