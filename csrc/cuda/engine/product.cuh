// Products: x from what blocks exchange to shared memory, its units with those of W, and what follows the sums.
#pragma once

#include "stream.cuh"

namespace {

// x times the norm's weight has no place in float16 before the row's scale is applied: there x is normed first.
template <class T>
struct NormedFirst {
    static constexpr bool value = false;
};
template <>
struct NormedFirst<Float16> {
    static constexpr bool value = true;
};

// A thread's part of a row's unit, normed and rounded.
template <class F>
__device__ Eight<F> normed(const Eight<F>& mine, const Eight<F>& weight, float scale) {
    using T = typename F::T;
    const auto pair = [&](uint32_t x, uint32_t w) {
        const auto one = [&](int shift) {
            const float value = mul(mul(widen<T>(uint16_t(x >> shift)), scale), widen<T>(uint16_t(w >> shift)));
            return uint32_t(narrow<T>(value)) << shift;
        };
        return one(0) | one(16);
    };
    return {make_uint2(pair(mine.low.x, weight.low.x), pair(mine.low.y, weight.low.y)),
            make_uint2(pair(mine.high.x, weight.high.x), pair(mine.high.y, weight.high.y))};
}

// Calls `of(block, m, v, column, real)` for each part `Eight` of `count` units of the rows of x. All lanes of a warp
// go through the loop alike, for they shuffle.
template <class T, int DEPTH>
template <class F, class Of>
__device__ __forceinline__ void Engine<T, DEPTH>::each_eight(int xs, int first, int count, Of of) const {
    const int all = xs * count * 16;
#pragma unroll 1
    for (int begin = warp * 32; begin < all; begin += warps * 32) {
        const int i = begin + lane, v = i / 4 % 4;
        const bool real = i < all;
        const int m = real ? i / 16 / count : 0, block = real ? i / 16 - m * count : 0;
        of(block, m, v, (first + block) * COLUMNS + first_column<F>(v, t), real);
    }
}

// What a phase reads: a vector that is being made, or what was there before.
template <class T, int DEPTH>
struct Engine<T, DEPTH>::Source {
    const Engine& engine;
    const uint16_t* from;
    int stride;
    bool waits;

    __device__ Source(const Engine& engine, const Phase& phase)
        : engine(engine), stride(phase.columns), waits(phase.input == NONE) {
        from = waits ? engine.from_of(phase) : static_cast<const uint16_t*>(engine.p.pointers[phase.input]);
    }

    // Columns column ... + 3 and as many `apart` further on.
    __device__ void load(int m, int column, int apart, uint2& low, uint2& high) const {
        const uint16_t* const at = from + int64_t(m) * stride + column;
        if (waits) return engine.wait_for(at, at + apart, low, high);
        low = *reinterpret_cast<const uint2*>(at), high = *reinterpret_cast<const uint2*>(at + apart);
    }

    // A quarter of a row's unit; all of it is asked for before any is waited for.
    template <class F>
    __device__ Quarter<F> quarter(int m, int first, bool real) const {
        Quarter<F> got{};
        if (!real) return got;
        const uint16_t* const at = from + int64_t(m) * stride + first;
        if (!waits) return Quarter<F>::load(at, true);
        const auto place = [&](int v) { return reinterpret_cast<const uint2*>(at + first_column<F>(v, threadIdx.x % 4)); };
#pragma unroll
        for (int v = 0; v < PAIRS; ++v)
            got.eight[v].low = load_relaxed(place(v)), got.eight[v].high = load_relaxed(place(v) + 16);
#pragma unroll 1
        for (uint32_t looks = 1;; ++looks) {
            bool all = true;
#pragma unroll
            for (int v = 0; v < PAIRS; ++v) all = all && there(got.eight[v].low) && there(got.eight[v].high);
            if (all || !engine.patient(looks)) return got;
#pragma unroll
            for (int v = 0; v < PAIRS; ++v) {
                if (!there(got.eight[v].low)) got.eight[v].low = load_relaxed(place(v));
                if (!there(got.eight[v].high)) got.eight[v].high = load_relaxed(place(v) + 16);
            }
        }
    }

    template <class F>
    __device__ Eight<F> eight(int m, int column, bool real) const {
        Eight<F> got = {make_uint2(0, 0), make_uint2(0, 0)};
        if (real) load(m, column, 64, got.low, got.high);
        return got;
    }
};

// `count` units of x from unit `first` on, in the order in which W's words meet them; with a norm their squares, too.
template <class T, int DEPTH>
template <class F>
__device__ __forceinline__ void Engine<T, DEPTH>::stage(const Phase& phase, int first, int count) {
    const int xs = rows / phase.fold;
    const Source source(*this, phase);
    uint32_t* const pairs = reinterpret_cast<uint32_t*>(x());
    constexpr bool NORMED_FIRST = NormedFirst<T>::value;
    if (NORMED_FIRST && phase.norm) {
        square_rows(phase);
        __syncthreads();
    }
    const auto scale_of = [&](int m) { return norm_scale(squares() + m, MOST_ROWS, phase.columns, phase.eps); };
    if (F::BITS != 16 && xs * count * 16 > 2 * int(blockDim.x)) {
        stage_quarters<F>(phase, source, xs, first, count);
    } else if (F::BITS == 16 && phase.norm && !NORMED_FIRST) {
        stage_words<F>(phase, source, xs, first, count);
    } else if constexpr (F::BITS == 16) {
        // Four words a piece of 8 columns, a thread of the multiplication each.
        for (int i = threadIdx.x; i < xs * count * 16; i += blockDim.x) {
            const int m = i / 16 / count, block = i / 16 - m * count, of_unit = i / 4 % 4, v = i % 4;
            const int column = (first + block) * COLUMNS + 32 * of_unit + 8 * v;
            Eight<F> mine;
            source.load(m, column, 4, mine.low, mine.high);
            if (phase.norm) {
                const auto quad = [&](int at) { return *reinterpret_cast<const uint2*>(phase.norm + column + at); };
                mine = normed<F>(mine, {quad(0), quad(4)}, scale_of(m));
            }
            uint32_t* const to = pairs + ((block * 4 + of_unit) * xs + m) * 16 + v;
            to[0] = mine.low.x, to[4] = mine.low.y, to[8] = mine.high.x, to[12] = mine.high.y;
        }
    } else {
        each_eight<F>(xs, first, count, [&](int block, int m, int v, int column, bool real) {
            Eight<F> weight;
            if (phase.norm) weight = Eight<F>::load(phase.norm + column, real);
            Eight<F> mine = source.template eight<F>(m, column, real);
            const bool head = real && v == 0 && t == 0;
            if (phase.norm && NORMED_FIRST) {
                mine = normed<F>(mine, weight, scale_of(m));
            } else if (phase.norm) {
                const float square = mine.sum(squared);
                if (head) squares()[(first + block) * MOST_ROWS + m] = square;
                mine.multiply(weight);
            }
            if (F::SUM_X) {
                const float sum = mine.sum(itself);
                if (head) sums_x()[block * MOST_ROWS + m] = sum;
            }
            if (real) mine.store(pairs + ((block * 4 * xs + m) * 4 + t) * 4 + v, xs * 16);
        });
    }
}

// `stage` where there is much of x: a thread has all parts of a row's unit, with the same bits, and waits once for four.
template <class T, int DEPTH>
template <class F>
__device__ __forceinline__ void Engine<T, DEPTH>::stage_quarters(const Phase& phase, const Source& source, int xs, int first,
                                                                 int count) {
    const int all = xs * count * 4;
#pragma unroll 1
    for (int begin = warp * 32; begin < all; begin += warps * 32) {
        const int i = begin + lane;
        const bool real = i < all;
        const int m = real ? i / 4 / count : 0, block = real ? i / 4 - m * count : 0, column = (first + block) * COLUMNS;
        Quarter<F> mine = source.template quarter<F>(m, column, real);
        if (phase.norm) {
            const Quarter<F> weight = Quarter<F>::load(phase.norm + column, real);
            if (NormedFirst<T>::value) {
                const float scale = norm_scale(squares() + m, MOST_ROWS, phase.columns, phase.eps);
#pragma unroll
                for (int v = 0; v < PAIRS; ++v) mine.eight[v] = normed<F>(mine.eight[v], weight.eight[v], scale);
            } else {
                const float square = mine.sum(squared);
                if (real && t == 0) squares()[(first + block) * MOST_ROWS + m] = square;
                mine.multiply(weight);
            }
        }
        if (F::SUM_X) {
            const float sum = mine.sum(itself);
            if (real && t == 0) sums_x()[block * MOST_ROWS + m] = sum;
        }
        uint4 sorted[4];
        mine.sort(sorted);
        if (real)
#pragma unroll
            for (int k = 0; k < 4; ++k) x()[((block * 4 + k) * xs + m) * 4 + t] = sorted[k];
    }
}

// `stage` of a dense weight with a norm, in the order of row_tiles.cu: a thread has a word of each of four pieces of 8 columns.
template <class T, int DEPTH>
template <class F>
__device__ __forceinline__ void Engine<T, DEPTH>::stage_words(const Phase& phase, const Source& source, int xs, int first,
                                                              int count) {
    each_eight<F>(xs, first, count, [&](int block, int m, int of_unit, int, bool real) {
        const int column = (first + block) * COLUMNS + 32 * of_unit;
        const auto norm = [&](int v) {
            return real ? *reinterpret_cast<const uint32_t*>(phase.norm + column + 8 * v + 2 * t) : 0;
        };
        const Eight<F> weight = {make_uint2(norm(0), norm(1)), make_uint2(norm(2), norm(3))};
        Eight<F> mine = {make_uint2(0, 0), make_uint2(0, 0)};
        const auto pair = [&](int v, uint2& words) {
            uint2 one, other;
            source.load(m, column + 8 * v + t / 2 * 4, 8, one, other);
            words = t % 2 ? make_uint2(one.y, other.y) : make_uint2(one.x, other.x);
        };
        if (real) pair(0, mine.low), pair(2, mine.high);
        const float square = mine.sum(squared);
        if (real && of_unit == 0 && t == 0) squares()[(first + block) * MOST_ROWS + m] = square;
        mine.multiply(weight);
        if (real) x()[((block * 4 + of_unit) * xs + m) * 4 + t] = {mine.low.x, mine.low.y, mine.high.x, mine.high.y};
    });
}

// The squares of all units of x.
template <class T, int DEPTH>
__device__ __forceinline__ void Engine<T, DEPTH>::square_rows(const Phase& phase) {
    using F = Form<T, 8, false>;  // any: of the order of sums
    const Source source(*this, phase);
    each_eight<F>(rows / phase.fold, 0, phase.columns / COLUMNS, [&](int block, int m, int v, int column, bool real) {
        const float square = source.template eight<F>(m, column, real).sum(squared);
        if (real && v == 0 && t == 0) squares()[block * MOST_ROWS + m] = square;
    });
}

// Adds this warp's next unit, which meets unit `unit` of the staged x, to the sums of its class.
template <class T, int DEPTH>
template <class F>
__device__ __forceinline__ void Engine<T, DEPTH>::add_unit(const Matrix& matrix, int unit, int parity, int xs, float (&total)[4]) {
    cp_async_wait_group<DEPTH - F::PARTS>();
    // What other lanes asked for is there as well.
    sync_warp();
    // Dense words are read as they are multiplied: there are twice as many as registers for them.
    constexpr bool DENSE = F::BITS == 16;
    uint4 words[2][F::PARTS];
    uint32_t both[2] = {};
    const auto place = [&](int part) {
        const int of_slot = slot + part < DEPTH ? slot + part : slot + part - DEPTH;
        return warp * DEPTH + of_slot;
    };
    if constexpr (!DENSE)
#pragma unroll
        for (int part = 0; part < F::PARTS; ++part)
#pragma unroll
            for (int half = 0; half < 2; ++half) words[half][part] = fifo()[place(part) * PART_PIECES + 32 * half + lane];
    if (F::GROUPED)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t* const from = fifo_scales() + place(0) * 32 + 8 * half + g;
            const int shift = parity * 16;
            both[half] = from[0] >> shift & 0xffff;
            if (F::SUM_X && matrix.zeros) both[half] |= from[16] >> shift << 16;
        }
    const auto go_on = [&] {
        // All lanes have read the slots that are asked for now.
        sync_warp();
        slot = slot + F::PARTS < DEPTH ? slot + F::PARTS : slot + F::PARTS - DEPTH;
        ask(F::PARTS);
    };
    if (!DENSE) go_on();

    const uint4* const from_x = x() + (unit * 4 * xs + (g < xs ? g : 0)) * 4 + t;
    float chain[2][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint4 b = from_x[i * xs * 4];
        uint32_t dense[2][4];
        if constexpr (DENSE)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                ldmatrix_x4(dense[half], fifo() + place(i) * PART_PIECES + 32 * half + lane % 8 * 4 +
                                             (lane / 8 ^ lane % 8 / 2));
        const auto pair = [&](int half, int v) {
            if constexpr (DENSE)
                return dense[half][v];
            else
                return weight_pair<F>(words[half], i, v);
        };
        mma_m16n8k16<T>(chain[0], pair(0, 0), pair(1, 0), pair(0, 1), pair(1, 1), b.x, b.y);
        mma_m16n8k16<T>(chain[1], pair(0, 2), pair(1, 2), pair(0, 3), pair(1, 3), b.z, b.w);
    }
    if (DENSE) go_on();
    float2 sum_x{};
    if (F::SUM_X) sum_x = *reinterpret_cast<const float2*>(sums_x() + unit * MOST_ROWS + 2 * t);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Affine<F> affine = F::GROUPED ? Affine<F>::of(both[half]) : Affine<F>::none();
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float& sum = total[2 * half + j];
            sum = affine.with_unit(sum, chain[0][2 * half + j], chain[1][2 * half + j], j ? sum_x.y : sum_x.x);
        }
    }
}

// Of the columns of x that are staged, this warp's units of some tiles; `to` has the sums of each tile and class.
template <class T, int DEPTH>
template <class F>
__device__ __forceinline__ void Engine<T, DEPTH>::multiply(const Matrix& matrix, const Share& share, int tiles, int chunk, int xs,
                                           float* to) {
    const int end = end_of_columns(share, chunk), stride = sums_stride(rows);
    // Whose scale lies in the upper half of its word.
    const int of_row = share.units & g & 1;
#pragma unroll 1
    for (int tile = 0, of_class = warp;; of_class += warps) {
        while (of_class >= share.classes) of_class -= share.classes, ++tile;
        if (tile >= tiles) break;
        float* const mine = to + (tile * share.classes + of_class) * sums_of_task(rows);
        float total[4] = {};
        const auto each = [&](auto of) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (2 * t + i % 2 < xs) of(mine[(2 * t + i % 2) * stride + i / 2 * 8 + g], total[i]);
        };
        if (chunk) each([](float& there, float& sum) { sum = there; });
#pragma unroll 1
        for (int unit = first_unit(chunk, of_class, share.classes); unit < end; unit += share.classes)
            add_unit<F>(matrix, unit - chunk, (of_row ^ unit) & 1, xs, total);
        each([](float& there, float& sum) { there = sum; });
    }
}

template <class T, int DEPTH>
template <class F>
__device__ __forceinline__ bool Engine<T, DEPTH>::product_of_form(const Phase& phase) {
    const Matrix& matrix = matrices()[now().index];
    const Share& share = shares()[now().index];
    const int xs = rows / phase.fold;
    const auto tiles_from = [&](int tile0) { return own_tiles(matrix, share, now().step) - tile0; };
    const auto whole = [&] { return p.x_columns >= phase.columns; };
    if (matrix.order == HEADS) prefetch_own(phase, matrix);
#pragma unroll 1
    for (int tile0 = 0; tiles_from(tile0) > 0; tile0 += share.together) {
        const int left = tiles_from(tile0), count = left < share.together ? left : share.together;
        float* const to = sums() + buffer * p.sums_floats;
        const Ahead ahead = look_ahead(phase, matrix, tile0, count);
#pragma unroll 1
        for (int chunk = 0; chunk < share.units; chunk = end_of_columns(share, chunk)) {
            if (!whole() || tile0 == 0) {
                // All have done with the columns before.
                if (tile0 || chunk) __syncthreads();
                stage<F>(phase, chunk, end_of_columns(share, chunk) - chunk);
                if (!together()) return false;
                if (phase.norm && chunk == 0 && tile0 == 0 && whole()) find_norms(phase);
            }
            multiply<F>(matrix, share, count, chunk, xs, to);
        }
        if (phase.norm && !whole() && tile0 == 0) find_norms(phase);
        __syncthreads();
        if (tile0 == 0) prefetch();
        if (matrix.order == HEADS)
            publish_heads(phase, matrix, share, tile0, count, to);
        else
            publish(phase, matrix, share, tile0, count, to, ahead);
        buffer ^= 1;
    }
    if (tiles_from(0) <= 0) __syncthreads();
    return true;
}

template <class T, int DEPTH>
__device__ __forceinline__ bool Engine<T, DEPTH>::product(const Phase& phase) {
    const Matrix& matrix = matrices()[now().index];
    if (matrix.bits == 4) return product_of_form<Form<T, 4, true>>(phase);
    if (matrix.bits == 16) return product_of_form<Form<T, 16, false>>(phase);
    if (matrix.grouped) return product_of_form<Form<T, 8, true>>(phase);
    return product_of_form<Form<T, 8, false>>(phase);
}

// Of each row of x, what its sums are scaled by; a warp each, the last first, for those who publish.
template <class T, int DEPTH>
__device__ void Engine<T, DEPTH>::find_norms(const Phase& phase) {
    if (lane) return;
    for (int m = warps - 1 - warp; m < rows / phase.fold; m += warps)
        norms()[m] = NormedFirst<T>::value ? 1 : norm_scale(squares() + m, MOST_ROWS, phase.columns, phase.eps);
}

// A result of a group of tiles.
template <class T, int DEPTH>
struct Engine<T, DEPTH>::Item {
    int tile, m, row;     // of the group, of x, of the tile
    int column, of_w;     // of the result, and its row of W
    bool real;

    // Item i of a group from tile tile0 on: neighbours are neighbouring columns.
    __device__ Item(const Engine& engine, const Phase& phase, const Matrix& matrix, int tile0, int i) {
        const int each = matrix.order == HALF || matrix.order == GATED ? 8 : 16, xs = engine.rows / phase.fold;
        row = i % each, tile = i / each / xs, m = i / each - tile * xs;
        column = (first_job(matrix) + (tile0 + tile) * engine.blocks) * each + row;
        of_w = column + (matrix.order == ACTIVE ? engine.p.first_row[engine.now().step] : 0);
        real = column < (matrix.order == ACTIVE ? engine.p.active_rows[engine.now().step] : matrix.order == GATED ? matrix.n / 2 : matrix.n);
    }
};

template <class T, int DEPTH>
__device__ int Engine<T, DEPTH>::items(const Phase& phase, const Matrix& matrix, int tiles) const {
    return tiles * (matrix.order == HALF || matrix.order == GATED ? 8 : 16) * (rows / phase.fold);
}

// What this thread's first result takes beside its sums, asked for before they are made.
template <class T, int DEPTH>
__device__ auto Engine<T, DEPTH>::look_ahead(const Phase& phase, const Matrix& matrix, int tile0, int tiles) const
    -> Ahead {
    Ahead ahead{};
    if (matrix.order == HEADS || int(threadIdx.x) >= items(phase, matrix, tiles)) return ahead;
    const Item item(*this, phase, matrix, tile0, threadIdx.x);
    if (!item.real) return ahead;
    if (phase.bias) ahead.bias = phase.bias[item.of_w];
    const int64_t place = (int64_t(item.m) * phase.width + item.column) / 4 * 4;
    if (phase.residual_input != NONE)
        ahead.residual = *reinterpret_cast<const uint2*>(
            static_cast<const uint16_t*>(p.pointers[phase.residual_input]) + place);
    else if (phase.residual != NONE)
        ahead.residual = load_relaxed(reinterpret_cast<const uint2*>(residual_from(phase) + place));
    return ahead;
}

// Over the classes, in order.
template <class T, int DEPTH>
__device__ float Engine<T, DEPTH>::sum_of(const Share& share, const float* from, int tile, int m, int row) const {
    const float* at = from + tile * share.classes * sums_of_task(rows) + m * sums_stride(rows) + row;
    float sum = 0;
#pragma unroll 8
    for (int i = 0; i < share.classes; ++i) sum += at[i * sums_of_task(rows)];
    return sum;
}

template <class T, int DEPTH>
__device__ __forceinline__ void Engine<T, DEPTH>::publish(const Phase& phase, const Matrix& matrix, const Share& share, int tile0,
                                          int tiles, const float* from, const Ahead& first) {
    const int all = items(phase, matrix, tiles);
    uint16_t* const to = phase.to == NONE ? nullptr : to_of(phase);
    uint16_t* const output = phase.output == NONE ? nullptr : static_cast<uint16_t*>(p.pointers[phase.output]);
    const bool by_row = matrix.bits == 8 && !matrix.grouped;
#pragma unroll 1
    for (int begin = warp * 32; begin < all; begin += warps * 32) {
        const bool inside = begin + lane < all;
        const Item item(*this, phase, matrix, tile0, inside ? begin + lane : 0);
        const bool real = inside && item.real;
        const bool early = begin == warp * 32;
        float value = 0;
        if (real) {
            const float norm = phase.norm ? norms()[item.m] : 1;
            const auto result = [&](int row, int of_w, uint16_t bias) {
                return product_of(sum_of(share, from, item.tile, item.m, row),
                                  by_row ? widen<T>(matrix.scales[of_w]) : 1, norm, phase.bias ? widen<T>(bias) : 0);
            };
            const auto bias = [&](int of_w) { return phase.bias ? phase.bias[of_w] : uint16_t(0); };
            if (matrix.order == GATED)
                value = swiglu_of(result(item.row, item.of_w, bias(item.of_w)),
                                  result(item.row + 8, item.of_w + matrix.n / 2, bias(item.of_w + matrix.n / 2)));
            else
                value = result(item.row, item.of_w, early ? first.bias : bias(item.of_w));
            if (phase.gelu) value = gelu_of(value);
            value += residual_of(phase, item, early ? first.residual : make_uint2(NOT_THERE, 0));
        }
        const uint16_t rounded = narrow<T>(value);
        const int64_t place = int64_t(item.m) * phase.width + item.column;
        if (output && real) output[place] = rounded;
        if (to) put_four(to + place, rounded, inside && item.column < phase.width);
    }
}

// What is added to a result. before: the piece that holds it as it was some time ago.
template <class T, int DEPTH>
__device__ float Engine<T, DEPTH>::residual_of(const Phase& phase, const Item& item, const uint2& before) const {
    const int64_t place = int64_t(item.m) * phase.width + item.column;
    if (phase.residual_input != NONE)
        return there(before) ? value_of(before, int(place % 4))
                             : widen<T>(static_cast<const uint16_t*>(p.pointers[phase.residual_input])[place]);
    if (phase.residual == NONE) return 0;
    // This block need not have read the vector yet.
    const uint2 piece = there(before) ? before : wait_for(residual_from(phase) + place / 4 * 4);
    return value_of(piece, int(place % 4));
}

template <class T, int DEPTH>
__device__ __forceinline__ bool Engine<T, DEPTH>::normalize(const Phase& phase) {
    square_rows(phase);
    if (!together()) return false;
    const Source source(*this, phase);
    const int xs = rows / phase.fold, quads = phase.columns / 4, all = xs * quads;
    uint16_t* const output = phase.output == NONE ? nullptr : static_cast<uint16_t*>(p.pointers[phase.output]);
    for (int i = blockIdx.x + threadIdx.x * blocks; i < all; i += blocks * blockDim.x) {
        const int m = i / quads, column = i % quads * 4;
        uint2 mine, weight = *reinterpret_cast<const uint2*>(phase.norm + column);
        source.load(m, column, 0, mine, mine);
        const float scale = norm_scale(squares() + m, MOST_ROWS, phase.columns, phase.eps);
        uint16_t values[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) values[e] = narrow<T>(mul(mul(value_of(mine, e), scale), value_of(weight, e)));
        const uint2 made = make_uint2(values[0] | uint32_t(values[1]) << 16, values[2] | uint32_t(values[3]) << 16);
        if (phase.to != NONE) put(to_of(phase) + int64_t(m) * phase.width + column, made);
        if (output) *reinterpret_cast<uint2*>(output + int64_t(m) * phase.width + column) = made;
    }
    // The next phase writes the squares.
    __syncthreads();
    return true;
}

}  // namespace
