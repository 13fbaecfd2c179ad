// Products of a codec's layers, with LayerNorm and GELU, for the rows of one or several streams; ring_attention.cuh and
// frames.cuh have the attention between them.
//
// Rows are positions, those of a stream neighbours. There may be several column tiles of 8 rows: of what a warp reads of W
// all of them have the multiplication before it goes on, so W is read once for all streams. The order of a row's sums is that
// of PRODUCT.
//
//   x        LayerNorm is applied where a block stages x, and rounded there: all its columns are in shared memory
//   moments  mean of each 128 columns and sum of squares about it, joined in order: no digits are lost where the mean is large
//   sums     one buffer, for many rows leave room for no more
#pragma once

#include "product.cuh"

namespace {

constexpr int TILE_ROWS = 8;  // of a column tile

// What is rounded before, as by a product of its own.
template <class T, int DEPTH>
__device__ float Engine<T, DEPTH>::gelu_of(float value) {
    const float x = widen<T>(narrow<T>(value));
    return mul(mul(x, 0.5f), add(1, erff(mul(x, 0.70710678118654752f))));
}

// `count` units of x from unit `first` on, as `stage` has them; LayerNorm where the phase has one. False if all are to leave.
template <class T, int DEPTH>
__device__ __forceinline__ bool Engine<T, DEPTH>::stage_rows(const Phase& phase, int first, int count) {
    const int all = rows * count * 16;
    const Source source(*this, phase);
    uint32_t* const pairs = reinterpret_cast<uint32_t*>(x());
    float* const moments = sums();  // [row, unit, mean and sum of squares about it]
    const auto words_of = [&](int i, int m) {
        const int block = i / 16 - m * count;
        return pairs + ((block * 4 + i / 4 % 4) * rows + m) * 16 + i % 4;
    };
    const auto store = [](uint32_t* to, const uint2& low, const uint2& high) {
        to[0] = low.x, to[4] = low.y, to[8] = high.x, to[12] = high.y;
    };
#pragma unroll 1
    for (int begin = warp * 32; begin < all; begin += warps * 32) {
        const int i = begin + lane;
        const bool real = i < all;
        const int m = real ? i / 16 / count : 0;
        uint2 low = make_uint2(0, 0), high = low;
        if (real) source.load(m, (first * 16 + i - m * count * 16) * 8, 4, low, high);
        if (phase.layer_norm) {
            float sum = 0, squares_of = 0;
            const auto over_unit = [](float value) {
#pragma unroll
                for (int mask = 1; mask < 16; mask *= 2) value += shfl_xor(value, mask);
                return value;
            };
#pragma unroll
            for (int e = 0; e < 8; ++e) sum = add(sum, value_of(e < 4 ? low : high, e % 4));
            const float mean = mul(over_unit(sum), 1.0f / COLUMNS);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const float apart = add(value_of(e < 4 ? low : high, e % 4), -mean);
                squares_of = add(squares_of, squared(apart));
            }
            const float about = over_unit(squares_of);
            if (real && i % 16 == 0) moments[i / 16 * 2] = mean, moments[i / 16 * 2 + 1] = about;
        }
        if (real) store(words_of(i, m), low, high);
    }
    if (!together()) return false;
    if (!phase.layer_norm) return true;
#pragma unroll 1
    for (int i = threadIdx.x; i < all; i += blockDim.x) {
        const int m = i / 16 / count, column = (i - m * count * 16) * 8;
        const float* const of_row = moments + m * count * 2;
        float mean = 0, about = 0;
        for (int unit = 0; unit < count; ++unit) mean = add(mean, of_row[2 * unit]);
        mean = mean / count;
        for (int unit = 0; unit < count; ++unit) {
            const float apart = add(of_row[2 * unit], -mean);
            about = add(about, fmaf(float(COLUMNS), squared(apart), of_row[2 * unit + 1]));
        }
        const float scale = rsqrtf(add(about / (count * COLUMNS), phase.eps));
        const auto normed_word = [&](uint32_t word, int at) {
            const auto one = [&](int shift) {
                const float apart = add(widen<T>(uint16_t(word >> shift)), -mean);
                const int place = column + at + shift / 16;
                const float value =
                    fmaf(mul(apart, scale), widen<T>(phase.layer_norm[place]), widen<T>(phase.layer_norm_bias[place]));
                return uint32_t(narrow<T>(value)) << shift;
            };
            return one(0) | one(16);
        };
        uint32_t* const words = words_of(i, m);
#pragma unroll
        for (int e = 0; e < 4; ++e) words[4 * e] = normed_word(words[4 * e], 2 * e);
    }
    __syncthreads();
    return true;
}

// `add_unit` of a dense weight for any number of column tiles, TILES at a time. sums_of_class: those before, unless it is the
// first unit of its class; they are not in registers while more is asked for.
template <class T, int DEPTH>
template <int TILES>
__device__ __forceinline__ void Engine<T, DEPTH>::add_unit_to_tiles(int unit, bool first, float* sums_of_class) {
    using F = Form<T, 16, false>;
    const int stride = sums_stride(rows);
    constexpr int PARTS = F::PARTS;
    cp_async_wait_group<DEPTH - PARTS>();
    // All lanes' copies are there.
    sync_warp();
#pragma unroll 1
    for (int row0 = 0; row0 < rows; row0 += TILES * TILE_ROWS) {
        float chain[TILES][2][4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int place = warp * DEPTH + (slot + i < DEPTH ? slot + i : slot + i - DEPTH);
            uint32_t w[2][4];
#pragma unroll
            for (int half = 0; half < 2; ++half)
                ldmatrix_x4(w[half], fifo() + place * PART_PIECES + 32 * half + lane % 8 * 4 + (lane / 8 ^ lane % 8 / 2));
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const int row = row0 + tile * TILE_ROWS + g, m = row < rows ? row : 0;
                const uint4 b = x()[((unit * 4 + i) * rows + m) * 4 + t];
                mma_m16n8k16<T>(chain[tile][0], w[0][0], w[1][0], w[0][1], w[1][1], b.x, b.y);
                mma_m16n8k16<T>(chain[tile][1], w[0][2], w[1][2], w[0][3], w[1][3], b.z, b.w);
            }
        }
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int m = row0 + tile * TILE_ROWS + 2 * t + e % 2;
                if (m >= rows) continue;
                float& sum = sums_of_class[m * stride + e / 2 * 8 + g];
                sum = Affine<F>::none().with_unit(first ? 0 : sum, chain[tile][0][e], chain[tile][1][e], 0);
            }
    }
    // All lanes have read the slots that are asked for now.
    sync_warp();
    slot = slot + F::PARTS < DEPTH ? slot + F::PARTS : slot + F::PARTS - DEPTH;
    ask(F::PARTS);
}

// `multiply` for several column tiles.
template <class T, int DEPTH>
template <int TILES>
__device__ __forceinline__ void Engine<T, DEPTH>::multiply_tiles(const Share& share, int tiles, int chunk) {
    const int end = end_of_columns(share, chunk);
#pragma unroll 1
    for (int tile = 0, of_class = warp;; of_class += warps) {
        while (of_class >= share.classes) of_class -= share.classes, ++tile;
        if (tile >= tiles) break;
        float* const mine = sums() + (tile * share.classes + of_class) * sums_of_task(rows);
#pragma unroll 1
        for (int unit = first_unit(chunk, of_class, share.classes); unit < end; unit += share.classes)
            add_unit_to_tiles<TILES>(unit - chunk, unit < share.classes, mine);
    }
}

// The walk of `product_of_form`, with one buffer of sums.
template <class T, int DEPTH>
template <int TILES>
__device__ __forceinline__ bool Engine<T, DEPTH>::product_of_tiles(const Phase& phase) {
    const Matrix& matrix = matrices()[now().index];
    const Share& share = shares()[now().index];
    const int tiles = share.own;
    const bool whole = p.x_columns >= phase.columns;
#pragma unroll 1
    for (int tile0 = 0; tile0 < tiles; tile0 += share.together) {
        const int count = tiles - tile0 < share.together ? tiles - tile0 : share.together;
        const Ahead ahead = look_ahead(phase, matrix, tile0, count);
#pragma unroll 1
        for (int chunk = 0; chunk < share.units; chunk = end_of_columns(share, chunk)) {
            if (!whole || tile0 == 0) {
                // All have done with the columns before; a phase begins after a barrier.
                const bool first = tile0 == 0 && chunk == 0;
                if (!first) __syncthreads();
                if (!stage_rows(phase, chunk, end_of_columns(share, chunk) - chunk)) return false;
            }
            multiply_tiles<TILES>(share, count, chunk);
        }
        // All sums are there.
        __syncthreads();
        if (!tile0) prefetch();
        publish(phase, matrix, share, tile0, count, sums(), ahead);
        // The next sums, and the next phase's, take their place.
        __syncthreads();
    }
    if (!tiles) __syncthreads();
    return true;
}

template <class T, int DEPTH>
__device__ __forceinline__ bool Engine<T, DEPTH>::product_of_rows(const Phase& phase) {
    const int lines = phase.layer_norm ? (phase.columns + 63) / 64 : 0;
    for (int i = threadIdx.x; i < lines; i += blockDim.x) {
        prefetch_l1(phase.layer_norm + i * 64);
        prefetch_l1(phase.layer_norm_bias + i * 64);
    }
    return rows > TILE_ROWS ? product_of_tiles<2>(phase) : product_of_tiles<1>(phase);
}

}  // namespace
