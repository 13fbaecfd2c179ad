// Attention over the positions so far.
#pragma once

#include "engine.cuh"

namespace {

template <int BITS, int DEPTH, bool USUAL>
__device__ inline void Engine<BITS, DEPTH, USUAL>::load_past(int layer, int position, int pair, Past& past) const {
    const int d = lane % 16;
    past.keys[0] = past.keys[1] = past.values[0] = past.values[1] = make_uint4(0, 0, 0, 0);
    if (position == 0 || pair >= heads / 2 || p.without & 4) return;
    const uint4* from = reinterpret_cast<const uint4*>(cache_of(layer, 2 * pair + lane / 16));
    if (d < position) past.keys[0] = load_shared_data(from + d), past.keys[1] = load_shared_data(from + POSITIONS + d);
    from += 2 * POSITIONS + d;
    past.values[0] = load_shared_data(from);
    if (position > 8) past.values[1] = load_shared_data(from + HEAD);
}

// Attention of the heads that this block needs, two a warp; lane d of 16 has value d of a head and position d.
template <int BITS, int DEPTH, bool USUAL>
__device__ inline void Engine<BITS, DEPTH, USUAL>::stage_attention(int layer, int position, Past& past) {
    const int pairs = heads / 4 * (needs == 3 ? 2 : 1), first = first_pair();
    const int sub = lane / 16, d = lane % 16;
    float* own = parts + warp * 12 * HEAD;
    for (int i = first + warp; i < first + pairs; i += warps) {
        const uint32_t head = 2 * i + sub;
        uint16_t* cache = cache_of(layer, head);
        if (i != first + warp) load_past(layer, position, i, past);
        uint4 keys[2] = {past.keys[0], past.keys[1]};

        const uint4* from = qkv + i * 48 + lane;
        uint4 piece, second;
        get(from, lane < 16 ? from + 32 : from, tag, piece, second);
        note(OUT, 0);
        sync_warp();
        untag(piece, *reinterpret_cast<float(*)[4]>(own + 4 * lane));
        if (lane < 16) untag(second, *reinterpret_cast<float(*)[4]>(own + 4 * (lane + 32)));
        sync_warp();
        const auto joined = [&](int part) {
            const float* at = own + sub * 6 * HEAD + part * HEAD + d;
            return widen<Bfloat16>(narrow<Bfloat16>(at[0] + at[3 * HEAD]));
        };
        float q = joined(0), k = joined(1);
        const uint16_t v = narrow<Bfloat16>(joined(2));
        const float cosine = angles[position * HEAD + d % 8], sine = angles[position * HEAD + 8 + d % 8];
        const float other_q = shfl_xor(q, 8), other_k = shfl_xor(k, 8);
        q = q * cosine + (d < 8 ? -other_q : other_q) * sine;
        const uint16_t key = narrow<Bfloat16>(k * cosine + (d < 8 ? -other_k : other_k) * sine);
        sync_warp();
        own[sub * 6 * HEAD + d] = q;
        const uint4* new_key = reinterpret_cast<const uint4*>(own + sub * 6 * HEAD + HEAD);
        const_cast<uint16_t*>(reinterpret_cast<const uint16_t*>(new_key))[d] = key;
        sync_warp();
        if (d == position) keys[0] = new_key[0], keys[1] = new_key[1];
        float score = 0;
#pragma unroll
        for (int e = 0; e < HEAD; e += 4) {
            float some[4];
            load_four(own + sub * 6 * HEAD + e, some);
#pragma unroll
            for (int f = 0; f < 4; ++f) {
                const uint32_t two = part_of(keys[e / 8], e % 8 / 2 + f / 2);
                score += some[f] * widen<Bfloat16>(uint16_t(two >> f % 2 * 16));
            }
        }
        score = d <= position ? score * 0.25f : -INFINITY;
        float most = score;
#pragma unroll
        for (int mask = 1; mask < 16; mask *= 2) most = fmaxf(most, shfl_xor(most, mask));
        float weight = d <= position ? fast_exp(score - most) : 0, all = weight;
#pragma unroll
        for (int mask = 1; mask < 16; mask *= 2) all += shfl_xor(all, mask);
        weight = fast_divide(weight, all);
        float* shares = own + sub * 6 * HEAD + 2 * HEAD;
        // The block that keeps this position's value may have written it already: it counts once.
        shares[d] = d == position ? 0 : weight;
        if (d == position) shares[HEAD] = weight;
        sync_warp();
        float sum = 0;
#pragma unroll
        for (int j = 0; j < POSITIONS; j += 4) {
            float some[4];
            load_four(shares + j, some);
#pragma unroll
            for (int f = 0; f < 4; ++f) {
                const uint32_t two = part_of(past.values[j / 8], j % 8 / 2 + f / 2);
                sum += some[f] * widen<Bfloat16>(uint16_t(two >> f % 2 * 16));
            }
        }
        sum += shares[HEAD] * widen<Bfloat16>(v);
        const uint16_t result = narrow<Bfloat16>(sum);
        x[place_of<BITS>(head * HEAD + d)] = result;
        if (SUM_X) {
            float plain = widen<Bfloat16>(result);
#pragma unroll
            for (int mask = 1; mask < 16; mask *= 2) plain += shfl_xor(plain, mask);
            if (d == 0) x_sums[head] = plain;
        }
        // A head's keys and values are written by the block that has, of the jobs of its half, the one of its number.
        const uint32_t each = heads / 2, half = head / each, job = head % each * 2 + half;
        if (job % blocks() == uint32_t(blockIdx.x)) {
            cache[(d / 8 * POSITIONS + position) * 8 + d % 8] = key;
            uint16_t* values = cache + POSITIONS * HEAD + (position / 8 * HEAD + d) * 8;
            if (position % 8 == 0)
                *reinterpret_cast<uint4*>(values) = make_uint4(v, 0, 0, 0);
            else
                values[position % 8] = v;
        }
    }
}

}  // namespace
