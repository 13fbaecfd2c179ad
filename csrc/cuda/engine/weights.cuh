// The stream of weights: which units a warp has, asking for them, and their products with x.
#pragma once

#include "engine.cuh"

namespace {

template <int BITS, int DEPTH, bool USUAL>
__device__ inline void Engine<BITS, DEPTH, USUAL>::plan() {
    int first = 0, before = 0;
    for (int which = 0; which < PHASES; ++which) {
        Phase& phase = phases[which];
        phase.inner = inner_of(which);
        phase.units = phase.inner * tiles_of(which);
        phase.first = first;
        phase.total = own_of(which) * phase.units;
        phase.start = before % warps;
        first += jobs_of(which) * phase.units;
        before += phase.total;
    }
}

// Lists this warp's units, after the plan.
template <int BITS, int DEPTH, bool USUAL>
__device__ inline void Engine<BITS, DEPTH, USUAL>::list() {
    units += warp * p.most_units;
    counts += warp * PHASES;
    for (int which = 0; which < PHASES; ++which) {
        const Phase& phase = phases[which];
        int count = 0;
        for (int i = (warp - phase.start + warps) % warps; i < phase.total; i += warps, ++count) {
            const int job = blockIdx.x + i / phase.units * blocks(), within = i % phase.units;
            const int half = which == GATE_UP ? 0 : job % 2;
            if (lane == 0)
                units[all_units + count] = Unit{phase.first + job * phase.units + within,
                                                uint16_t(half * phase.inner + within % phase.inner), uint16_t(i)};
        }
        if (lane == 0) counts[which] = count;
        all_units += count;
    }
    sync_warp();
}

template <int BITS, int DEPTH, bool USUAL>
__device__ inline void Engine<BITS, DEPTH, USUAL>::ask() {
    if (layers_to_ask && all_units && !(p.without & 2)) {
        const int64_t number = int64_t(ask_layer) * layer_units + units[ask_unit].number;
        const uint64_t policy = ask_layer < p.keep ? kept : others;
        const int place = warp * DEPTH + ask_slot;
        const uint4* from = p.words + number * PARTS * 32 + lane;
#pragma unroll
        for (int i = 0; i < PARTS; ++i) copy_16(fifo + (place * PARTS + i) * 32 + lane, from + i * 32, policy);
        copy_8(fifo_scales + place * 32 + lane, p.scales + number * 8 + g, policy);
        if (++ask_unit == all_units) {
            ask_unit = 0;
            --layers_to_ask;
            if (++ask_layer == p.layers) ask_layer = 0;
        }
    }
    cp_async_commit_group();
    ask_slot = ask_slot + 1 == DEPTH ? 0 : ask_slot + 1;
}

// The sums of this warp's next unit, asked for with at least LEFT after it.
template <int BITS, int DEPTH, bool USUAL>
template <int LEFT>
__device__ inline void Engine<BITS, DEPTH, USUAL>::multiply_next() {
    const Unit now = units[unit];
    cp_async_wait_group<LEFT>();
    const int place = warp * DEPTH + slot;
    multiply_unit(fifo + place * PARTS * 32 + lane, fifo_scales[place * 32 + lane], now.block, sums + now.sums * TILE);
    unit = unit + 1 == all_units ? 0 : unit + 1;
    slot = slot + 1 == DEPTH ? 0 : slot + 1;
}

// Of this warp's units of a phase, each of which makes room for the next to ask for.
//
// PACED, for the usual launch, in which a warp has one unit of QKV or of OUT, two of GATE_UP and one of DOWN: it asks
// for one in each phase, so that copies come evenly rather than by bursts before what blocks exchange. It begins
// with one less than there is room for, and one less are on their way from GATE_UP to the next layer's QKV or OUT.
template <int BITS, int DEPTH, bool USUAL>
template <int WHICH>
__device__ inline void Engine<BITS, DEPTH, USUAL>::multiply() {
    int count = counts[WHICH];
    if constexpr (USUAL && PACED) {
        constexpr int LEFT = WHICH == QKV || WHICH == DOWN ? DEPTH - 2 : DEPTH - 1;
        if (WHICH == GATE_UP || WHICH == DOWN || count) multiply_next<LEFT>();
        ask();
        if (WHICH == GATE_UP) multiply_next<DEPTH - 1>();
    } else {
#pragma unroll 1
        for (; count; --count) {
            multiply_next<DEPTH - 1>();
            ask();
        }
    }
}

template <int BITS, int DEPTH, bool USUAL>
__device__ inline void Engine<BITS, DEPTH, USUAL>::multiply_unit(const uint4* from, const uint2 scale, int block,
                                                                 float* to) {
    const uint4* from_x = reinterpret_cast<const uint4*>(x + block * COLUMNS) + t;
    uint4 upper[PARTS / 2], lower[PARTS / 2], values[4];
#pragma unroll
    for (int i = 0; i < PARTS / 2; ++i) upper[i] = from[i * 32], lower[i] = from[(PARTS / 2 + i) * 32];
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = from_x[4 * i];
    // Independent sums, so that a product need not wait for the one before.
    float some[4][4] = {};
    if constexpr (BITS == 8) {
#pragma unroll
        for (int part = 0; part < 2; ++part)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t up = part_of(upper[part], i), low = part_of(lower[part], i);
                const uint4& both = values[part * 2 + i / 2];
                mma_m16n8k16<Bfloat16>(some[i], byte_pair(up), byte_pair(low), byte_pair(up >> 8),
                                       byte_pair(low >> 8), part_of(both, i % 2 * 2), part_of(both, i % 2 * 2 + 1));
            }
    } else {
#pragma unroll
        for (int s = 0; s < 4; s += 2)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t up = part_of(upper[0], i), low = part_of(lower[0], i);
                mma_m16n8k16<Bfloat16>(some[i], pair(up, 4 * s), pair(low, 4 * s), pair(up, 4 * s + 4),
                                       pair(low, 4 * s + 4), part_of(values[i], s), part_of(values[i], s + 1));
            }
    }
    // All columns of the products are the one row of x: a thread in four stores.
    if (t == 0) {
        float plain = 0;
        if (SUM_X) {
            float first[4], second[4];
            load_four(x_sums + block * (COLUMNS / 16), first), load_four(x_sums + block * (COLUMNS / 16) + 4, second);
#pragma unroll
            for (int i = 0; i < 4; ++i) plain += first[i] + second[i];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t both = half ? scale.y : scale.x;
            float sum = some[0][2 * half] + some[1][2 * half] + (some[2][2 * half] + some[3][2 * half]);
            if (SUM_X) sum -= (OFFSET_INT4 + from_half(uint16_t(both >> 16))) * plain;
            to[half * 8 + g] = widen<Bfloat16>(uint16_t(both)) * sum;
        }
    }
}

}  // namespace
