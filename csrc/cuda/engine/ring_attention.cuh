// Attention of a stream's new positions, whose keys and values lie in a ring.
//
// A job is a stream and a head: one block reads the head's part of the ring. Key j of a job is position lo + j, where lo is
// the first one that the stream's first new position sees; up to `old` keys are in the ring, the others new, from what is
// exchanged. New positions' slots hold what no row sees any more, so nobody reads them in this launch.
//
//   scores   S = K Q^T, 16 keys x 8 queries an instruction; of a head's 64 values, thread t has pieces t and t + 4 of 8
//   values   Y = V^T P^T: group n has every 8th tile of 16 keys; P is rounded to T, its sum is not; groups are added in order
#pragma once

#include "codec.cuh"

namespace {

constexpr int QUERIES = 8;          // of an instruction
constexpr int RING_HEAD = 64;       // values of a head
constexpr int RING_GROUPS = 8;
constexpr int HEAD_PIECES = RING_HEAD / 8;

// From a query's scores to the next one's: no bank twice.
__host__ __device__ inline int ring_stride(int stream_rows, int context) {
    return (context + stream_rows + 15) / 16 * 16 + 4;
}

// Bytes of x's place that ATTEND_RING takes: q, new keys and values; scores; sums of groups; sums of weights.
__host__ __device__ inline int ring_bytes(int stream_rows, int context) {
    return 3 * stream_rows * RING_HEAD * 2 +
           4 * (QUERIES * ring_stride(stream_rows, context) + RING_GROUPS * QUERIES * RING_HEAD + QUERIES);
}

// A head of a stream: its part of the ring.
template <class T, int DEPTH>
struct Engine<T, DEPTH>::Ring {
    int stream, head;
    int old, count;  // keys in the ring; all
    int place;       // slot of the first
    int next;        // of the first new position
    int size;
    uint16_t *keys, *values;

    __device__ Ring(const Engine& engine, const Phase& phase, int stream, int head)
        : stream(stream), head(head), size(engine.p.capacity) {
        const Program& p = engine.p;
        const int64_t start = p.starts[stream] < 0 ? 0 : p.starts[stream];
        old = start < p.context ? int(start) : p.context, count = old + p.stream_rows;
        place = int((start - old) % size), next = int(start % size);
        const int64_t base = phase.layer * p.layer_stride + p.slots[stream] * p.slot_stride + head * p.head_stride;
        keys = p.keys + base, values = p.values + base;
    }

    // Where key or value j lies, of an array that is in the ring or new.
    __device__ const uint16_t* old_row(const uint16_t* of, int j) const {
        const int at = place + j < size ? place + j : place + j - size;
        return of + int64_t(at) * RING_HEAD;
    }
    __device__ uint16_t* new_row(uint16_t* of, int i) const {
        return of + int64_t((next + i) % size) * RING_HEAD;
    }

    // Piece `at` of what is at j; zeros after the last one. fresh: new ones, in shared memory.
    template <class Piece>
    __device__ Piece piece(const uint16_t* of, const uint16_t* fresh, int j, int at) const {
        if (j >= count) return Piece{};
        const uint16_t* const row = j < old ? old_row(of, j) : fresh + (j - old) * RING_HEAD;
        return reinterpret_cast<const Piece*>(row)[at];
    }
};

template <class T, int DEPTH>
__device__ __forceinline__ bool Engine<T, DEPTH>::attend_ring(const Phase& phase) {
#pragma unroll 1
    for (int job = blockIdx.x; job < rows / p.stream_rows * p.heads; job += blocks) {
        const Ring ring(*this, phase, job / p.heads, job % p.heads);
        // While q is being made.
        for (int j = threadIdx.x; j < ring.old; j += blockDim.x) {
            prefetch_l2(ring.old_row(ring.keys, j));
            prefetch_l2(ring.old_row(ring.values, j));
        }
        uint16_t* const fresh = reinterpret_cast<uint16_t*>(x());  // [q k v, row, RING_HEAD]
        if (!bring_heads(phase, ring, fresh)) return false;
#pragma unroll 1
        for (int first = 0; first < p.stream_rows; first += QUERIES) attend_queries(phase, ring, fresh, first);
        const int pieces = p.stream_rows * HEAD_PIECES;
        for (int i = threadIdx.x; i < 2 * pieces; i += blockDim.x) {
            const int row = i % pieces / HEAD_PIECES, which = i / pieces;
            uint4* const to = reinterpret_cast<uint4*>(ring.new_row(which ? ring.values : ring.keys, row));
            own_store(to + i % HEAD_PIECES, reinterpret_cast<const uint4*>(fresh)[pieces + i]);
        }
        // The next job's q takes their place.
        __syncthreads();
    }
    return together();
}

// New q, k and v of a head, q and k rotated, all of T.
template <class T, int DEPTH>
__device__ __forceinline__ bool Engine<T, DEPTH>::bring_heads(const Phase& phase, const Ring& ring, uint16_t* to) {
    constexpr int HALF_HEAD = RING_HEAD / 2, QUADS = HALF_HEAD / 4;
    const int each = p.stream_rows;
    const uint16_t* const from = from_of(phase);
    for (int i = threadIdx.x; i < 3 * each * QUADS; i += blockDim.x) {
        const int part = i / (each * QUADS), row = i / QUADS % each, d = i % QUADS * 4;
        const int m = ring.stream * each + row;
        const uint16_t* const at = from + int64_t(m) * phase.columns + (part * p.heads + ring.head) * RING_HEAD + d;
        uint2 low, high;
        wait_for(at, at + HALF_HEAD, low, high);
        if (part < 2) {
            const float* const angle = p.rope + m * HALF_HEAD + d;
            uint16_t turned[2][4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float first = value_of(low, e), second = value_of(high, e);
                const float cosine = angle[e], sine = angle[rows * HALF_HEAD + e];
                turned[0][e] = narrow<T>(add(mul(first, cosine), -mul(second, sine)));
                turned[1][e] = narrow<T>(add(mul(second, cosine), mul(first, sine)));
            }
            const auto four = [](const uint16_t(&of)[4]) {
                return make_uint2(of[0] | uint32_t(of[1]) << 16, of[2] | uint32_t(of[3]) << 16);
            };
            low = four(turned[0]), high = four(turned[1]);
        }
        uint16_t* const place = to + (part * each + row) * RING_HEAD + d;
        *reinterpret_cast<uint2*>(place) = low;
        *reinterpret_cast<uint2*>(place + HALF_HEAD) = high;
    }
    return together();
}

// Rows first ... first + QUERIES - 1 of a stream. It ends with a barrier.
template <class T, int DEPTH>
__device__ __forceinline__ void Engine<T, DEPTH>::attend_queries(const Phase& phase, const Ring& ring,
                                                                 const uint16_t* fresh, int first) {
    const int each = p.stream_rows, stride = ring_stride(each, p.context), tiles = (ring.count + 15) / 16;
    const uint16_t* const fresh_keys = fresh + each * RING_HEAD;
    const uint16_t* const fresh_values = fresh_keys + each * RING_HEAD;
    float* const scores = reinterpret_cast<float*>(x()) + 3 * each * RING_HEAD / 2;  // [query, stride]
    float* const group_sums = scores + QUERIES * stride;                           // [group, query, RING_HEAD]
    float* const totals = group_sums + RING_GROUPS * QUERIES * RING_HEAD;          // [query]

    const int own_row = first + g < each ? first + g : first;
    const uint4* const own_q = reinterpret_cast<const uint4*>(fresh) + own_row * HEAD_PIECES;
    const uint4 q[2] = {own_q[t], own_q[t + 4]};
    constexpr int AHEAD = 2;  // tiles that a warp asks for at once
#pragma unroll 1
    for (int begin = warp; begin < tiles; begin += AHEAD * warps) {
        uint4 key[AHEAD][2][2];  // [tile, keys g and g + 8, piece]
#pragma unroll
        for (int n = 0; n < AHEAD; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int j = (begin + n * warps) * 16 + i / 2 * 8 + g;
                key[n][i / 2][i % 2] = ring.template piece<uint4>(ring.keys, fresh_keys, j, t + i % 2 * 4);
            }
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) {
            const int tile = begin + n * warps;
            if (tile >= tiles) break;
            float score[4] = {};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint4 &upper = key[n][0][i], &lower = key[n][1][i];
                mma_m16n8k16<T>(score, upper.x, lower.x, upper.y, lower.y, q[i].x, q[i].y);
                mma_m16n8k16<T>(score, upper.z, lower.z, upper.w, lower.w, q[i].z, q[i].w);
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int query = 2 * t + e % 2, j = tile * 16 + e / 2 * 8 + g, newest = ring.old + first + query;
                const bool seen = j < ring.count && j <= newest && j >= newest - p.context;
                scores[query * stride + j] = seen ? score[e] * 0.125f : -INFINITY;  // 1 / sqrt(RING_HEAD)
            }
        }
    }
    __syncthreads();
    for (int query = warp; query < QUERIES; query += warps) {
        float* const own = scores + query * stride;
        float most = -INFINITY, all = 0;
        for (int j = lane; j < tiles * 16; j += 32) most = fmaxf(most, own[j]);
#pragma unroll
        for (int mask = 1; mask < 32; mask *= 2) most = fmaxf(most, shfl_xor(most, mask));
        for (int j = lane; j < tiles * 16; j += 32) {
            const float weight = fast_exp(own[j] - most);
            own[j] = weight, all += weight;
        }
#pragma unroll
        for (int mask = 1; mask < 32; mask *= 2) all += shfl_xor(all, mask);
        if (lane == 0) totals[query] = all;
    }
    __syncthreads();
    // A warp has half of the values of a group: thread g four neighbouring ones.
#pragma unroll 1
    for (int unit = warp; unit < 2 * RING_GROUPS; unit += warps) {
        const int group = unit / 2, half = unit % 2;
        float sum[2][4] = {};
#pragma unroll 2
        for (int tile = group; tile < tiles; tile += RING_GROUPS) {
            uint2 value[4];  // of keys 2 t, 2 t + 1 and 8 more
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int j = tile * 16 + 2 * t + i % 2 + i / 2 * 8;
                value[i] = ring.template piece<uint2>(ring.values, fresh_values, j, half * 8 + g);
            }
            uint32_t weights[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float* const two = scores + g * stride + tile * 16 + 2 * t + i * 8;
                weights[i] = narrow<T>(two[0]) | uint32_t(narrow<T>(two[1])) << 16;
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const auto of = [&](int k) { return i ? value[k].y : value[k].x; };
                mma_m16n8k16<T>(sum[i], prmt(of(0), of(1), 0x5410), prmt(of(0), of(1), 0x7632),
                                prmt(of(2), of(3), 0x5410), prmt(of(2), of(3), 0x7632), weights[0], weights[1]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                group_sums[(group * QUERIES + 2 * t + e % 2) * RING_HEAD + half * 32 + 4 * g + 2 * i + e / 2] = sum[i][e];
    }
    __syncthreads();
    uint16_t* const to = to_of(phase);
#pragma unroll 1
    for (int begin = warp * 32; begin < QUERIES * RING_HEAD; begin += warps * 32) {
        const int query = (begin + lane) / RING_HEAD, d = (begin + lane) % RING_HEAD;
        float sum = 0;
#pragma unroll
        for (int group = 0; group < RING_GROUPS; ++group) sum += group_sums[(group * QUERIES + query) * RING_HEAD + d];
        const int row = first + query, m = ring.stream * each + row;
        put_four(to + int64_t(m) * phase.width + ring.head * RING_HEAD + d, narrow<T>(fast_divide(sum, totals[query])),
                 row < each);
    }
    __syncthreads();
}

}  // namespace
