// Attention of a new position over a long cache, in parts that blocks share.
//
// A job is a row, a head of keys and values with the heads of q that read it, and a part of the row's positions; how many
// parts there are, and how long, follows from the row's length alone. Each part makes its greatest score, the sum of its
// weights and its sums of values; the block of part 0 puts all together, in order. The part that holds the new position takes
// its key and value from what is exchanged, as it takes q, and keeps them; nobody reads them from the cache in this launch.
#pragma once

#include "product.cuh"

namespace {

template <class T, int DEPTH>
struct Engine<T, DEPTH>::Part {
    int m, head, number;
    int64_t slot;
    int length, size, parts, first, count;

    // False where there is no such part, or where it is the only one of a row without a position.
    __device__ Part(const Engine& engine, int m, int head, int number) : m(m), head(head), number(number) {
        const Program& p = engine.p;
        const int64_t start = p.starts[m];
        const int most = p.capacity < p.positions ? p.capacity : p.positions;
        slot = p.slots[m];
        length = start < 0 || start >= most ? 0 : int(start) + 1;
        const int each = (length + PARTS_OF_ROW - 1) / PARTS_OF_ROW;
        size = each < LEAST_PART ? LEAST_PART : (each + LEAST_PART - 1) / LEAST_PART * LEAST_PART;
        parts = length ? (length + size - 1) / size : 1;
        first = number * size;
        count = length - first < size ? length - first : size;
    }
    __device__ bool exists() const { return number < parts; }
};

template <class T, int DEPTH>
__device__ __forceinline__ bool Engine<T, DEPTH>::attend(const Phase& phase) {
    const int pairs = rows * p.kv_heads;
#pragma unroll 1
    for (int job = blockIdx.x; job < pairs * PARTS_OF_ROW; job += blocks) {
        const Part part(*this, job % pairs / p.kv_heads, job % p.kv_heads, job / pairs);
        if (part.exists() && !attend_part(phase, part)) return false;
    }
#pragma unroll 1
    for (int job = blockIdx.x; job < pairs; job += blocks) {
        const Part part(*this, job / p.kv_heads, job % p.kv_heads, 0);
        if (part.parts > 1) merge_parts(phase, part);
    }
    return together();
}

// Floats of a part: of each head of q its greatest score and the sum of its weights, then its sums of values.
template <class T, int DEPTH>
__device__ float* Engine<T, DEPTH>::part_of(const Phase& phase, const Part& part, int number) const {
    const int share = p.heads / p.kv_heads, each = share * (p.head_dim + 2);
    float* const all = reinterpret_cast<float*>(vector(phase.partial, now().step, false));
    return all + ((int64_t(part.m) * p.kv_heads + part.head) * PARTS_OF_ROW + number) * each;
}

template <class T, int DEPTH>
__device__ __forceinline__ bool Engine<T, DEPTH>::attend_part(const Phase& phase, const Part& part) {
    const int width = p.head_dim, half = width / 2, share = p.heads / p.kv_heads;
    const int position = part.length - 1, new_place = position - part.first;
    // Found again where it is needed: no register is kept for it.
    const auto to = [&] { return to_of(phase) + int64_t(part.m) * phase.width + part.head * share * width; };
    if (part.length == 0) {
        for (int i = threadIdx.x; i < share * width / 4; i += blockDim.x) put(to() + 4 * i, make_uint2(0, 0));
        return true;
    }
    // Shared memory: q, then the new key and value; scores; sums of groups.
    float* const q = reinterpret_cast<float*>(x());
    float* const turned = q + (share + 2) * width;
    float* const scores = turned + (share + 1) * width;
    float* const group_sums = scores + share * part.size;
    float* const shares = group_sums + SPLIT_GROUPS * width;

    const uint16_t* const from = from_of(phase) + int64_t(part.m) * phase.columns;
    for (int i = threadIdx.x; i < (share + 2) * width / 4; i += blockDim.x) {
        const int which = 4 * i / width, within = 4 * i % width;
        const int head = which < share ? part.head * share + which
                                       : p.heads + (which - share) * p.kv_heads + part.head;
        const uint2 four = wait_for(from + head * width + within);
#pragma unroll
        for (int e = 0; e < 4; ++e) q[4 * i + e] = value_of(four, e);
    }
    if (!together()) return false;
    const float scale = rsqrtf(float(width));
    for (int i = threadIdx.x; i < (share + 1) * half; i += blockDim.x) {
        const int which = i / half, d = i % half;
        const float first = q[which * width + d], second = q[which * width + d + half];
        const float cosine = p.rope[int64_t(position) * half + d];
        const float sine = p.rope[(int64_t(p.positions) + position) * half + d];
        const float a = first * cosine - second * sine, b = second * cosine + first * sine;
        const bool key = which == share;
        turned[which * width + d] = key ? widen<T>(narrow<T>(a)) : a * scale;
        turned[which * width + d + half] = key ? widen<T>(narrow<T>(b)) : b * scale;
    }
    __syncthreads();
    const float* const new_key = turned + share * width;
    const float* const new_value = q + (share + 1) * width;
    const auto place_of = [&](int position) {
        return phase.layer * p.layer_stride + part.slot * p.slot_stride + part.head * p.head_stride + int64_t(position) * width;
    };
    const uint16_t* const keys = p.keys + place_of(part.first);
    const uint16_t* const values = p.values + place_of(part.first);

    // Lanes of a position have eight values each; a warp looks at four times as many positions at once.
    const int lanes = width / 8, each = 32 / lanes, of_position = lane % lanes;
#pragma unroll 1
    for (int begin = warp * each; begin < part.count; begin += 4 * warps * each) {
        uint4 key[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int j = begin + n * warps * each + lane / lanes;
            key[n] = make_uint4(0, 0, 0, 0);
            if (j < part.count && j != new_place)
                key[n] = reinterpret_cast<const uint4*>(keys + int64_t(j) * width)[of_position];
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int j = begin + n * warps * each + lane / lanes;
            for (int h = 0; h < share; ++h) {
                const float* const own_q = turned + h * width + 8 * of_position;
                float score = 0;
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    const uint32_t two = word(key[n], e / 2);
                    const float k = j == new_place ? new_key[8 * of_position + e] : widen<T>(uint16_t(two >> e % 2 * 16));
                    score += own_q[e] * k;
                }
                for (int mask = 1; mask < lanes; mask *= 2) score += shfl_xor(score, mask);
                if (of_position == 0 && j < part.count) scores[h * part.size + j] = score;
            }
        }
    }
    __syncthreads();
    for (int h = warp; h < share; h += warps) {
        float* const own_scores = scores + h * part.size;
        float most = -INFINITY, all = 0;
        for (int j = lane; j < part.count; j += 32) most = fmaxf(most, own_scores[j]);
#pragma unroll
        for (int mask = 1; mask < 32; mask *= 2) most = fmaxf(most, shfl_xor(most, mask));
        for (int j = lane; j < part.count; j += 32) {
            const float weight = fast_exp(own_scores[j] - most);
            own_scores[j] = weight, all += weight;
        }
#pragma unroll
        for (int mask = 1; mask < 32; mask *= 2) all += shfl_xor(all, mask);
        if (lane == 0) shares[2 * h] = most, shares[2 * h + 1] = all;
    }
    __syncthreads();
    float* const made = part.parts > 1 ? part_of(phase, part, part.number) : nullptr;
#pragma unroll 1
    for (int h = 0; h < share; ++h) {
        // Group n has every SPLIT_GROUPS-th run of `each` positions.
#pragma unroll 1
        for (int group = warp; group < SPLIT_GROUPS; group += warps) {
            float total[8] = {};
#pragma unroll 2
            for (int j = group * each + lane / lanes; j < part.count; j += SPLIT_GROUPS * each) {
                const float weight = scores[h * part.size + j];
                uint4 value = make_uint4(0, 0, 0, 0);
                if (j != new_place) value = reinterpret_cast<const uint4*>(values + int64_t(j) * width)[of_position];
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    const float v = j == new_place ? new_value[8 * of_position + e]
                                                   : widen<T>(uint16_t(word(value, e / 2) >> e % 2 * 16));
                    total[e] += weight * v;
                }
            }
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                for (int mask = lanes; mask < 32; mask *= 2) total[e] += shfl_xor(total[e], mask);
                if (lane < lanes) group_sums[group * width + 8 * lane + e] = total[e];
            }
        }
        __syncthreads();
        const auto sum_of_groups = [&](int d) {
            float sum = 0;
            for (int group = 0; group < SPLIT_GROUPS; ++group) sum += group_sums[group * width + d];
            return sum;
        };
        if (made) {
            float* const of_head = made + h * (width + 2);
            for (int i = threadIdx.x; i < half + 1; i += blockDim.x) {
                const float first = i ? sum_of_groups(2 * i - 2) : shares[2 * h];
                const float second = i ? sum_of_groups(2 * i - 1) : shares[2 * h + 1];
                put(of_head + 2 * i, make_uint2(float_bits(first), float_bits(second)));
            }
        } else {
            for (int begin = warp * 32; begin < width; begin += warps * 32) {
                const int d = begin + lane < width ? begin + lane : 0;
                const float value = fast_divide(sum_of_groups(d), shares[2 * h + 1]);
                put_four(to() + h * width + d, narrow<T>(value), begin + lane < width);
            }
        }
        __syncthreads();
    }
    if (new_place >= 0 && new_place < part.count) {
        for (int d = threadIdx.x; d < width; d += blockDim.x) {
            own_store(p.keys + place_of(position) + d, narrow<T>(new_key[d]));
            own_store(p.values + place_of(position) + d, narrow<T>(new_value[d]));
        }
        // The next job's q takes their place.
        __syncthreads();
    }
    return true;
}

template <class T, int DEPTH>
__device__ __forceinline__ void Engine<T, DEPTH>::merge_parts(const Phase& phase, const Part& part) {
    const int width = p.head_dim, share = p.heads / p.kv_heads;
    uint16_t* const to = to_of(phase) + int64_t(part.m) * phase.width + part.head * share * width;
    const auto pair = [&](int number, int h, int i) {
        const float* const from = part_of(phase, part, number) + h * (width + 2) + 2 * i;
        return wait_for(reinterpret_cast<const uint16_t*>(from));
    };
    for (int i = threadIdx.x; i < share * width / 4; i += blockDim.x) {
        const int h = 4 * i / width, d = 4 * i % width;
        float most = -INFINITY, all = 0, sums_of[4] = {};
        for (int n = 0; n < part.parts; ++n) most = fmaxf(most, bits_float(pair(n, h, 0).x));
        for (int n = 0; n < part.parts; ++n) {
            const uint2 head = pair(n, h, 0), first = pair(n, h, 1 + d / 2), second = pair(n, h, 2 + d / 2);
            const float factor = fast_exp(bits_float(head.x) - most);
            all += factor * bits_float(head.y);
            sums_of[0] += factor * bits_float(first.x), sums_of[1] += factor * bits_float(first.y);
            sums_of[2] += factor * bits_float(second.x), sums_of[3] += factor * bits_float(second.y);
        }
        uint16_t made[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) made[e] = narrow<T>(fast_divide(sums_of[e], all));
        put(to + 4 * i, make_uint2(made[0] | uint32_t(made[1]) << 16, made[2] | uint32_t(made[3]) << 16));
    }
}

}  // namespace
