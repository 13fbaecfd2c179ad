// Attention among few positions, by the block that has made a head's q, k and v: keys and values need not leave it.
//
// A position attends to those of earlier steps, whose keys and values the block has in its own cache, and to new ones: its
// own, or those of the rows that are together (the frames of a patch). q and k are rotated here; what is kept is of T.
#pragma once

#include "product.cuh"

namespace {

// What this block's first heads have of earlier positions, into L1.
template <class T, int DEPTH>
__device__ void Engine<T, DEPTH>::prefetch_own(const Phase& phase, const Matrix& matrix) const {
    const int heads = matrix.job / p.head_dim, first = first_job(matrix) * heads;
    if (!p.cached || now().step == 0 || first >= p.heads) return;
    // 1 KB of a row's head are neighbours of the next row's.
    for (int i = threadIdx.x; i < heads * rows * 8; i += blockDim.x)
        prefetch_l1(own_cache_of(phase.layer, first, 0) + i * 64);
}

template <class T, int DEPTH>
__device__ __forceinline__ void Engine<T, DEPTH>::publish_heads(const Phase& phase, const Matrix& matrix, const Share& share,
                                                int tile0, int tiles, const float* from) {
    const int columns = matrix.job, octets = columns / 8, each = tiles_of_job(matrix), dim = matrix.n / 3;
    const int heads = columns / p.head_dim;
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile += each) {
        const int first = (first_job(matrix) + (tile0 + tile) / each * blocks) * columns;
        for (int i = threadIdx.x; i < 3 * columns * rows; i += blockDim.x) {
            const int m = i / (3 * columns), place = i - m * 3 * columns, octet = place / 8;
            const int of_w = octet / octets * dim + first + place % columns;
            const float scale = matrix.bits == 8 && !matrix.grouped ? widen<T>(matrix.scales[of_w]) : 1;
            const float value = product_of(sum_of(share, from, tile + octet / 2, m, octet % 2 * 8 + place % 8), scale,
                                           phase.norm ? norms()[m] : 1, phase.bias ? widen<T>(phase.bias[of_w]) : 0);
            new_heads()[i] = widen<T>(narrow<T>(value));
        }
        __syncthreads();
#pragma unroll 1
        for (int i = warp; i < heads * rows; i += warps)
            attend_own(phase, columns, first, i / rows * p.head_dim, i % rows);
        // The next job's heads take the place of these.
        if (tile + each < tiles) __syncthreads();
    }
}

// One warp: row m of the head whose columns begin at first + within; lane d has value d, lane j position j.
template <class T, int DEPTH>
__device__ __forceinline__ void Engine<T, DEPTH>::attend_own(const Phase& phase, int columns, int first, int within, int m) {
    const int width = p.head_dim, half = width / 2, step = now().step, past = p.cached ? step : 0;
    const int first_row = p.cached ? m : m - m % p.together;
    const int news = p.cached ? 1 : p.causal ? m % p.together + 1 : p.together;
    const int head = (first + within) / width;
    float* const q = own() + warp * OWN_SCRATCH;
    float* const keys = q + OWN_HEAD;  // of the new positions
    uint16_t* const cache = own_cache_of(phase.layer, head, m);
    // Of a row, rotated to its position.
    const auto rotated = [&](int row, int part, int d) {
        const float* const at = new_heads() + (row * 3 + part) * columns + within;
        const int position = p.cached ? step : row % p.together;
        const float* const angle = p.rope + position * half + d % half;
        const float cosine = angle[0], sine = angle[p.positions * half];
        return d < half ? at[d] * cosine - at[d + half] * sine : at[d] * cosine + at[d - half] * sine;
    };
    const float scale = rsqrtf(float(width));
    if (lane < width) q[lane] = rotated(m, 0, lane) * scale;
    for (int i = lane; i < news * width; i += 32) {
        const int row = first_row + i / width;
        keys[i / width * OWN_HEAD + i % width] = widen<T>(narrow<T>(rotated(row, 1, i % width)));
    }
    sync_warp();
    float score = -INFINITY;
    if (lane < past + news) {
        score = 0;
        if (lane < past) {
            for (int d = 0; d < width; d += 4) {
                const uint2 four = own_load(reinterpret_cast<const uint2*>(cache + lane * OWN_HEAD + d));
#pragma unroll
                for (int e = 0; e < 4; ++e) score += q[d + e] * value_of(four, e);
            }
        } else {
            for (int d = 0; d < width; ++d) score += q[d] * keys[(lane - past) * OWN_HEAD + d];
        }
    }
    float most = score;
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) most = fmaxf(most, shfl_xor(most, mask));
    float weight = lane < past + news ? fast_exp(score - most) : 0, all = weight;
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) all += shfl_xor(all, mask);
    weight = fast_divide(weight, all);
    const int d = lane < width ? lane : 0;
    float sum = 0;
    const uint16_t* const values = cache + OWN_POSITIONS * OWN_HEAD + d * OWN_POSITIONS;
    for (int j = 0; j < past; j += 4) {
        const uint2 four = own_load(reinterpret_cast<const uint2*>(values + j));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float of_position = shfl(weight, j + e);
            if (j + e < past) sum += of_position * value_of(four, e);
        }
    }
    for (int j = 0; j < news; ++j)
        sum += shfl(weight, past + j) * new_heads()[((first_row + j) * 3 + 2) * columns + within + d];
    put_four(to_of(phase) + int64_t(m) * phase.width + first + within + d, narrow<T>(sum), lane < width);
    if (p.cached && lane < width) {
        own_store(cache + past * OWN_HEAD + d, narrow<T>(keys[d]));
        const float value = new_heads()[(m * 3 + 2) * columns + within + d];
        own_store(cache + OWN_POSITIONS * OWN_HEAD + d * OWN_POSITIONS + past, narrow<T>(value));
    }
    // The warp's next row has its place.
    sync_warp();
}

}  // namespace
