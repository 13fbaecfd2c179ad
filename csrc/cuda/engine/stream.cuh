// The stream of weights: which tiles a block has, in which order its warps multiply their units, and asking for them as
// many parts ahead, across phases and steps.
#pragma once

#include "engine.cuh"

namespace {

// Tiles of a job of HEADS: of q, k and v.
__device__ inline int tiles_of_job(const Matrix& m) { return (3 * m.job / 8 + 1) / 2; }

// Jobs of a product, of a tile each but for HEADS.
__device__ inline int jobs_of(const Matrix& m, int active) {
    switch (m.order) {
        case HALF: return (m.n + 7) / 8;
        case GATED: return (m.n / 2 + 7) / 8;
        case HEADS: return m.n / 3 / m.job;
        case ACTIVE: return (active + 15) / 16;
        default: return (m.n + 15) / 16;
    }
}

// The first job of a block; its others follow by the number of blocks.
__device__ inline int first_job(const Matrix& m) {
    const int place = int(blockIdx.x) - m.first;
    return place < 0 ? place + int(gridDim.x) : place;
}

__device__ inline int own_jobs(const Matrix& m, int active) {
    const int jobs = jobs_of(m, active), first = first_job(m);
    return jobs > first ? (jobs - first + int(gridDim.x) - 1) / int(gridDim.x) : 0;
}

template <class T, int DEPTH>
__device__ Share Engine<T, DEPTH>::share_of(const Matrix& m) const {
    if (!m.n) return Share{};
    const int units = m.k / COLUMNS, most = classes_of(m.k), classes = units < most ? units : most;
    const int each = m.order == HEADS ? tiles_of_job(m) : 1;
    const int together = p.sums_floats / (classes * sums_of_task(rows) * each);
    const bool alike = m.order != HEADS && m.order != ACTIVE;
    const int of_tile = m.order == WHOLE ? 16 : 8;
    return Share{uint16_t(classes),
                 uint16_t(units),
                 uint16_t((together ? together : 1) * each),
                 uint16_t(own_jobs(m, 0) * each),
                 units * m.bits,
                 first_job(m) * of_tile,
                 blocks * of_tile,
                 !alike ? SEVERAL : m.order == WHOLE ? 8 : m.order == GATED ? m.n / 2 : 0};
}

template <class T, int DEPTH>
__device__ int Engine<T, DEPTH>::own_tiles(const Matrix& m, const Share& share, int step) const {
    return m.order == ACTIVE ? own_jobs(m, p.active_rows[step]) : share.own;
}

// Row `within` of an octet of this block's tile, as a row of W; NONE where the tile has no such octet. Of tiles that are not
// alike.
template <class T, int DEPTH>
__device__ int Engine<T, DEPTH>::weight_row(const Matrix& m, int step, int own, int half, int within) const {
    if (m.order == HEADS) {
        const int each = tiles_of_job(m), octets = m.job / 8, octet = own % each * 2 + half;
        const int job = first_job(m) + own / each * blocks;
        return octet < 3 * octets ? octet / octets * (m.n / 3) + job * m.job + octet % octets * 8 + within : NONE;
    }
    const int row = 16 * (first_job(m) + own * blocks) + 8 * half + within, last = p.active_rows[step] - 1;
    return p.first_row[step] + (row < last ? row : last);
}

// The first unit of a class from unit `chunk` on, where the columns of x begin that are there.
__device__ inline int first_unit(int chunk, int of_class, int classes) {
    const int first = chunk / classes * classes + of_class;
    return first < chunk ? first + classes : first;
}

template <class T, int DEPTH>
__device__ __forceinline__ void Engine<T, DEPTH>::begin() {
    walk = Walk{};
    keep(group(), Group{});
    begin_columns();
    settle();
}

// At the first task of this warp among tiles and columns; all lanes have read the group before.
template <class T, int DEPTH>
__device__ __forceinline__ void Engine<T, DEPTH>::begin_columns() {
    const Share& share = shares()[walk.phase];
    const int left = own_tiles(matrices()[walk.phase], share, group().step) - group().tile0;
    keep(group().tiles, left < share.together ? left : int(share.together));
    walk.tile = walk.part = 0, walk.of_class = warp, walk.unit = NONE;
}

// Goes on until the walk is at a unit that there is: after the last one of its class, or at none before. Its order is that of `product_of_form` and `multiply`: groups of tiles,
// in them x by as many columns as there is place for, in them a task a warp, which is a tile and a class, in it units.
template <class T, int DEPTH>
__device__ __forceinline__ void Engine<T, DEPTH>::settle() {
    bool same_tile = walk.unit != NONE;
#pragma unroll 1
    while (walk.phase < p.count) {
        const Share& share = shares()[walk.phase];
        Group here = group();
        const int end = end_of_columns(share, here.chunk);
        for (; walk.tile < here.tiles; walk.of_class += warps, walk.unit = NONE) {
            while (walk.of_class >= share.classes) walk.of_class -= share.classes, ++walk.tile;
            if (walk.tile >= here.tiles) break;
            if (walk.unit == NONE) walk.unit = first_unit(here.chunk, walk.of_class, share.classes), same_tile = false;
            if (walk.unit >= end) continue;
            if (!same_tile) find_rows();
            return;
        }
        // The next columns of the same tiles, the next tiles, the next phase.
        const bool tiles_over = here.tiles <= 0 || end == share.units;
        here.chunk = tiles_over ? 0 : end;
        if (tiles_over) here.tile0 += here.tiles > 0 ? here.tiles : 0;
        if (tiles_over && here.tile0 >= own_tiles(matrices()[walk.phase], share, here.step)) {
            here.tile0 = 0;
            if (!advance(walk.phase, here.step)) return;
        }
        keep(group(), here);
        begin_columns();
    }
}

// Where this lane's words of the walk's unit begin.
template <class T, int DEPTH>
__device__ __forceinline__ void Engine<T, DEPTH>::find_rows() {
    const Matrix& m = matrices()[walk.phase];
    const Share& share = shares()[walk.phase];
    const int tile = group().tile0 + walk.tile;
    int upper, lower;
    if (share.second == SEVERAL) {
        const int step = group().step;
        upper = weight_row(m, step, tile, 0, g), lower = weight_row(m, step, tile, 1, g);
        walk.scale_row = weight_row(m, step, tile, lane / 8 % 2, lane % 8);
    } else {
        // A last tile of one octet has some row for its second.
        const auto at_most = [&](int row) { return row < m.n ? row : m.n - 1; };
        const int first = share.row + tile * share.to_next;
        upper = at_most(first + g), lower = share.second ? at_most(first + g + share.second) : NONE;
        walk.scale_row = at_most(first + lane % 8 + lane / 8 % 2 * share.second);
    }
    walk.upper = upper * share.pieces, walk.lower = lower < 0 ? NONE : lower * share.pieces;
}

// Asks for the next parts of this warp's stream of units, which wait in the slots after the last one; a group of copies each.
template <class T, int DEPTH>
__device__ __forceinline__ void Engine<T, DEPTH>::ask(int count) {
    const auto commit = [&] {
        cp_async_commit_group();
        ask_slot = ask_slot + 1 == DEPTH ? 0 : ask_slot + 1;
        --count;
    };
#pragma unroll 1
    while (count) {
        if (walk.phase >= p.count) {
            commit();
            continue;
        }
        const Matrix& m = matrices()[walk.phase];
        const int parts = m.bits / 4;
        const uint64_t policy = m.keep ? policy_evict_last() : policy_evict_first();
        const uint4* from = m.words + walk.upper + (walk.unit * m.bits + 4 * walk.part + t);
        // Dense words are sorted to where `ldmatrix` reads them without meeting in a bank.
        uint4* const to = fifo() + warp * DEPTH * PART_PIECES + (m.bits == 16 ? g * 4 + (t ^ g / 2) : lane);
        if (m.grouped && walk.part == 0 && walk.scale_row >= 0) {
            const uint16_t* const table = lane < 16 ? m.scales : m.zeros;
            const int64_t at = int64_t(walk.scale_row) * shares()[walk.phase].units + walk.unit;
            if (table) copy_4(fifo_scales() + (warp * DEPTH + ask_slot) * 32 + lane, table + (at & ~int64_t(1)));
        }
#pragma unroll 1
        do {
            copy_16(to + ask_slot * PART_PIECES, from, policy);
            if (walk.lower >= 0) copy_16(to + ask_slot * PART_PIECES + 32, from + (walk.lower - walk.upper), policy);
            from += 4;
            commit();
        } while (++walk.part < parts && count);
        if (walk.part == parts) {
            walk.part = 0;
            walk.unit += shares()[walk.phase].classes;
            settle();
        }
    }
}

}  // namespace
