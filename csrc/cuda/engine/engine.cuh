// The state of a block of the persistent decoder, and the order of its phases; decoder.cu explains them. What a phase
// does is in weights.cuh, exchange.cuh, attention.cuh and logits.cuh.
#pragma once

#include <grid.cuh>

namespace {

constexpr int COLUMNS = 128;
constexpr int TILE = 16;
constexpr int HEAD = 16;
constexpr int POSITIONS = 16;  // as many as a head has columns
constexpr int PHASES = 4;
constexpr int END = PHASES, DRAW = PHASES + 1, NOTED = PHASES + 2;
constexpr int TIMES = 4;
constexpr int CHANNELS = 8;
constexpr int FRAMES = 4;
constexpr uint32_t PATIENCE = 1 << 20;

constexpr int AND_OR = 0xea;      // (a & b) | c
constexpr int NOT_AND_OR = 0xae;  // (~a & b) | c
constexpr uint32_t HALVES = 0x000f000f;
constexpr uint32_t MAGIC = 0x43004300;
constexpr float OFFSET_INT4 = 128 + 8;

#ifndef PACED
#define PACED 1
#endif

// Of the launch that has a kernel of its own.
constexpr int USUAL_DIM = 1024, USUAL_FFN = 4096, USUAL_BLOCKS = 128, USUAL_THREADS = 512;
// A block has a job of each phase but two of GATE_UP; a warp a unit of QKV or of OUT, two of GATE_UP and one of DOWN.
static_assert(USUAL_BLOCKS == USUAL_DIM / 8 && USUAL_BLOCKS == USUAL_FFN / TILE / 2);
static_assert(USUAL_THREADS / 32 == USUAL_DIM / COLUMNS * 2 && USUAL_THREADS / 32 == USUAL_FFN / COLUMNS / 2);

enum { QKV, OUT, GATE_UP, DOWN };

struct Decoder {
    const uint4* words;      // [layers, units of a layer, BITS / 2, 32]
    const uint2* scales;     // [layers, units of a layer, 8]: scale and zero of row g, then of row g + 8
    const uint16_t* norms;   // [2 layers + 1, dim]
    const uint16_t* bias;    // [layers, 3 dim]
    const float* angles;     // [POSITIONS, 2, HEAD / 2]: cosines, sines
    const uint16_t* inputs;  // [steps, dim], or with heads [1, dim]
    const uint16_t* heads;   // [rows of all channels, dim], or null
    const uint16_t* embeddings;  // [rows of all channels, dim]
    const float* noise;      // [FRAMES, rows of all channels], or null
    int* codes;              // [channels, FRAMES]
    uint16_t* hidden;        // [steps, dim]
    uint16_t* cache;         // [layers, heads, 512]: k [2, 16 positions, 8], v [2, 16, 8 positions]
    uint4* exchanged;        // of each phase what `Engine` says; zeros at first
    uint32_t* state;         // the last tag, 32 words on an error; zeros at first
    int64_t* clocks;         // [blocks, NOTED, TIMES], or null
    int dim, ffn, layers, steps;
    int keep;                // layers whose weights are to stay in L2; < 0: L2 is told nothing
    int pause;               // nanoseconds between two looks
    int without;             // for measurements, which spoil the result: 1 the waiting for data, 2 the weights' copies,
                             // 4 the reads of earlier keys and values
    float eps;
    float per_temperature;
    int channels;
    int firsts[CHANNELS + 1], empty[CHANNELS];  // rows of the channels; codes that are not drawn
    int most_sums, most_units;  // units of a block's largest phase, of a warp in a layer
};

struct Phase {
    int units, inner;  // of a job; those that a sum has
    int first;         // unit of a layer
    int total;         // units of this block
    int start;         // warp of the first unit
};

// A unit of a warp: its number in a layer; the block of columns of x that it meets; where its sums go.
struct Unit {
    int number;
    uint16_t block, sums;
};

__device__ inline uint32_t part_of(const uint4& words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

__device__ inline uint32_t pair(uint32_t word, int shift) { return lop3<AND_OR>(word >> shift, HALVES, MAGIC); }

// Two q + 128 of a word, at bits 0 and 16, as two q: 128 and the low seven bits, less 128 or 256.
__device__ inline uint32_t byte_pair(uint32_t word) {
    return add_pairs<Bfloat16>(lop3<AND_OR>(word, 0x007f007f, MAGIC), lop3<NOT_AND_OR>(word, 0x00800080, 0xc300c300));
}

// 16 bytes of shared memory at once.
__device__ inline void load_four(const float* from, float (&values)[4]) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    values[0] = bits_float(bits.x), values[1] = bits_float(bits.y);
    values[2] = bits_float(bits.z), values[3] = bits_float(bits.w);
}

__device__ inline float silu(float value) { return fast_divide(value, 1 + fast_exp(-value)); }

// Where column c of x lies in shared memory, in 16-bit values: as the four registers of a 16-byte load that meet the
// words of a thread.
template <int BITS>
__device__ inline uint32_t place_of(uint32_t c) {
    constexpr uint32_t PLANES = 32 / BITS, WIDTH = COLUMNS / PLANES, HALF = PLANES / 2;
    const uint32_t plane = c % COLUMNS / WIDTH, word = c % WIDTH, t = word % 16 / 4;
    const uint32_t reg = word / 16 * 8 + word % 4 * HALF + plane % HALF;
    return c / COLUMNS * COLUMNS + ((reg / 4 * 4 + t) * 4 + reg % 4) * 2 + plane / HALF;
}

// How far behind column c that of c + e lies: c is a multiple of 4, e less than 4.
template <int BITS>
__device__ constexpr uint32_t place_after(uint32_t e) { return BITS == 8 ? e / 2 * 32 + e % 2 * 4 : e * 32; }

// A float32 as an integer of the same order.
__device__ inline uint32_t ordered(float value) {
    const uint32_t bits = float_bits(value);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ inline uint32_t tagged(float value, uint32_t tag, int i) {
    const uint32_t bits = float_bits(value);
    return ((bits + 8) & ~15u) | (tag >> 4 * i & 15);
}

__device__ inline bool is_of(const uint4& piece, uint32_t tag) {
    return (((piece.x ^ tag) | (piece.y ^ tag >> 4) | (piece.z ^ tag >> 8) | (piece.w ^ tag >> 12)) & 15) == 0;
}

__device__ inline void untag(const uint4& piece, float (&values)[4]) {
    values[0] = bits_float(piece.x & ~15u);
    values[1] = bits_float(piece.y & ~15u);
    values[2] = bits_float(piece.z & ~15u);
    values[3] = bits_float(piece.w & ~15u);
}

template <int BITS, int DEPTH, bool USUAL>
struct Engine {
    static constexpr bool SUM_X = BITS == 4;  // int8 has neither zeros nor an offset
    static constexpr int PARTS = BITS / 2;  // 16-byte words of a thread in a unit

    const Decoder& p;
    const int warps = threads() / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int heads = dim() / HEAD, quads = dim() / 4;

    // What the usual launch knows when it is compiled.
    __device__ int dim() const { return USUAL ? USUAL_DIM : p.dim; }
    __device__ int ffn() const { return USUAL ? USUAL_FFN : p.ffn; }
    __device__ int threads() const { return USUAL ? USUAL_THREADS : int(blockDim.x); }
    __device__ int blocks() const { return USUAL ? USUAL_BLOCKS : int(gridDim.x); }

    __device__ int jobs_of(int which) const { return which == GATE_UP ? ffn() / TILE : dim() / 8; }
    __device__ int tiles_of(int which) const { return which == QKV ? 3 : which == GATE_UP ? 2 : 1; }
    __device__ int inner_of(int which) const {
        return which == DOWN ? ffn() / COLUMNS / 2 : which == GATE_UP ? dim() / COLUMNS : dim() / COLUMNS / 2;
    }
    __device__ int own_of(int which) const {
        return USUAL ? jobs_of(which) / blocks() : (jobs_of(which) - int(blockIdx.x) + blocks() - 1) / blocks();
    }

    // Shared memory.
    uint4* fifo;        // [warps, DEPTH, PARTS, 32]
    uint2* fifo_scales; // [warps, DEPTH, 32]
    uint16_t* x;        // [max(dim, ffn)], in the order of `place_of`
    float* x_sums;      // of 16 columns of x
    float* squares;     // of 128 columns of the residual
    float* sums;        // [units of the block's largest phase, TILE]
    float* parts;       // [warps, 2 heads, 2 halves, 3 HEAD]
    float* angles;      // [POSITIONS, 2, HEAD / 2]
    Phase* phases;      // [PHASES]
    Unit* units;        // [warps, most_units], of a layer
    int* counts;        // [warps, PHASES]: units of each phase
    int64_t* times;     // [NOTED, TIMES]
    uint32_t* bests;    // [FRAMES, 2, 32]: of each warp the greatest of a channel, and its code
    uint32_t* stop;

    // Buffers of what is exchanged: pieces of four columns.
    uint4* qkv;    // [heads, 2 halves of K, q k v, 4]
    uint4* out;    // [2 halves of K, dim / 4]
    uint4* gated;  // [ffn / 4]
    uint4* down;   // [2 halves of K, dim / 4]
    uint4* logits; // [rows of the active channels / 4, rounded up]

    uint64_t kept, others;
    int layer_units;
    int needs = 0;         // the halves of K of this block's OUT and DOWN jobs, a bit each
    float residual[4];     // columns 4 threadIdx.x ...
    uint32_t tag;          // of this layer
    int64_t since = 0;

    // Of this warp's units of a layer: all of them, the next to ask for, the next to multiply; and their slots.
    int all_units = 0, ask_unit = 0, unit = 0, ask_slot = 0, slot = 0;
    int ask_layer = 0, layers_to_ask;

    __device__ Engine(const Decoder& p, unsigned char* shared) : p(p) {
        fifo = reinterpret_cast<uint4*>(shared);
        fifo_scales = reinterpret_cast<uint2*>(fifo + warps * DEPTH * PARTS * 32);
        const int widest = dim() > ffn() ? dim() : ffn();
        times = reinterpret_cast<int64_t*>(fifo_scales + warps * DEPTH * 32);
        x = reinterpret_cast<uint16_t*>(times + NOTED * TIMES);
        x_sums = reinterpret_cast<float*>(x + widest);
        parts = x_sums + widest / 16;
        squares = parts + warps * 12 * HEAD;
        angles = squares + 32;
        bests = reinterpret_cast<uint32_t*>(angles + POSITIONS * HEAD);
        sums = reinterpret_cast<float*>(bests + FRAMES * 64);
        units = reinterpret_cast<Unit*>(sums + p.most_sums * TILE);
        counts = reinterpret_cast<int*>(units + warps * p.most_units);
        phases = reinterpret_cast<Phase*>(counts + warps * PHASES);
        stop = reinterpret_cast<uint32_t*>(phases + PHASES);
        qkv = p.exchanged;
        out = qkv + heads * 24;
        gated = out + 2 * quads;
        down = gated + ffn() / 4;
        logits = down + 2 * quads;
        kept = p.keep < 0 ? policy_evict_normal() : policy_evict_last();
        others = p.keep < 0 ? policy_evict_normal() : policy_evict_first();
        for (int job = blockIdx.x; job < dim() / TILE * 2; job += blocks()) needs |= 1 << job % 2;
        layer_units = (4 * dim() + 3 * ffn()) / TILE * (dim() / COLUMNS);
        layers_to_ask = p.layers * p.steps;
        if (threadIdx.x == 0) {
            *stop = 0;
            plan();
        }
        for (int i = threadIdx.x; i < POSITIONS * HEAD; i += threads()) angles[i] = p.angles[i];
        for (int i = threadIdx.x; i < NOTED * TIMES; i += threads()) times[i] = 0;
    }

    __device__ void plan();
    __device__ void list();
    __device__ void ask();
    template <int LEFT>
    __device__ void multiply_next();
    template <int WHICH>
    __device__ void multiply();
    __device__ void multiply_unit(const uint4* from, const uint2 scale, int block, float* to);
    __device__ bool get(const uint4* from, const uint4* other, uint32_t tag, uint4& piece, uint4& second);
    __device__ bool get(const uint4* from, uint32_t tag, uint4& piece);

    // Of norm i, what this thread multiplies with. Weights like these come from DRAM: they are asked for phases ahead.
    __device__ uint2 norm_of(int i) const {
        if (int(threadIdx.x) >= quads || i > 2 * p.layers) return make_uint2(0, 0);
        return reinterpret_cast<const uint2*>(p.norms + int64_t(i) * dim())[threadIdx.x];
    }

    __device__ void stage_residual(int which, const uint4* partial, uint32_t tag, const uint2 weight,
                                   const uint16_t* input);

    __device__ float norm_scale() const {
        float square = 0;
#pragma unroll 8
        for (int i = 0; i < dim() / COLUMNS; ++i) square += squares[i];
        return rsqrtf(square / dim() + p.eps);
    }

    __device__ void stage_gated();

    // Of two heads, lane d of 16 of each: the key of position d, rubbish where none is yet; value d of all positions,
    // zeros where none is.
    struct Past {
        uint4 keys[2], values[2];
    };

    __device__ uint16_t* cache_of(int layer, int head) const {
        return p.cache + (int64_t(layer) * heads + head) * POSITIONS * 2 * HEAD;
    }

    __device__ int first_pair() const { return needs & 1 ? 0 : heads / 4; }

    __device__ void load_past(int layer, int position, int pair, Past& past) const;
    __device__ void stage_attention(int layer, int position, Past& past);
    __device__ void add(int first, int inner, int quad, float (&total)[4]) const;

    __device__ void put(uint4* to, const float (&values)[4]) const {
        store_relaxed(to, make_uint4(tagged(values[0], tag, 0), tagged(values[1], tag, 1), tagged(values[2], tag, 2),
                                     tagged(values[3], tag, 3)));
    }

    __device__ const uint2* bias_of(int layer, uint32_t i) const {
        const uint32_t job = blockIdx.x + i / 12 * blocks(), row = i % 12 / 4 * dim() + job / 2 * HEAD + i % 4 * 4;
        return reinterpret_cast<const uint2*>(p.bias + int64_t(layer) * 3 * dim() + row);
    }

    __device__ void publish_gated(float scale);
    template <int WHICH>
    __device__ void publish(int layer, const uint2 first_bias, float scale);

    __device__ void note(int phase, int time) {
        if (p.clocks == nullptr || threadIdx.x) return;
        const int64_t now = clocks_now();
        if (phase >= 0) times[phase * TIMES + time] += now - since;
        since = now;
    }

    // From what is staged to what is published. False if all are to leave.
    template <int WHICH>
    __device__ bool finish(int layer, const uint2 bias = {}) {
        __syncthreads();
        if (*stop) return false;
        note(WHICH, 1);
        // Of those that publish.
        float scale = 0;
        if ((WHICH == QKV || WHICH == GATE_UP) && (!USUAL || warp == 0)) scale = norm_scale();
        multiply<WHICH>();
        __syncthreads();
        note(WHICH, 2);
        publish<WHICH>(layer, bias, scale);
        note(WHICH, 3);
        return true;
    }

    __device__ uint2 first_bias_of(int layer) const {
        if (layer == p.layers) layer = 0;
        return int(threadIdx.x) < own_of(QKV) * 12 ? *bias_of(layer, threadIdx.x) : make_uint2(0, 0);
    }

    static __device__ float dot(const uint4& a, const uint4& b);

    // Rows first ... last - 1 of the heads: this step's channels.
    struct Active {
        int low, high, first, rows;
    };

    __device__ Active active_in(int step) const {
        const int low = step < FRAMES ? 0 : step - FRAMES + 1, high = step < p.channels ? step + 1 : p.channels;
        return {low, high, p.firsts[low], p.firsts[high] - p.firsts[low]};
    }

    // Row i of those that are this block's: every blocks()-th four of them.
    __device__ int head_row(int i) const { return (blockIdx.x + i / 4 * blocks()) * 4 + i % 4; }

    __device__ void load_head(const Active& active, int row, uint4 (&values)[4]) const;
    __device__ void make_logits(const Active& active, uint4 (&values)[4], const uint4 (&more)[4]);
    __device__ void load_noise(int step, const Active& active, int i, float (&noise)[4]) const;
    __device__ bool draw(int step, const Active& active, const float (&noises)[2][4]);

    __device__ bool step(int step) {
        uint2 norm = norm_of(0), bias = first_bias_of(0);
#pragma unroll 1
        for (int layer = 0; layer < p.layers; ++layer) {
            const uint32_t before = tag++;
            const bool given = layer == 0 && (step == 0 || p.heads == nullptr);
            stage_residual(QKV, layer ? down : nullptr, before, norm, given ? p.inputs + int64_t(step) * dim() : nullptr);
            // These come while the phase multiplies and nobody waits for what is exchanged.
            Past past;
            load_past(layer, step, first_pair() + warp, past);
            const uint2 norm_between = norm_of(2 * layer + 1);
            if (!finish<QKV>(layer, bias)) return false;
            stage_attention(layer, step, past);
            if (!finish<OUT>(layer)) return false;
            stage_residual(GATE_UP, out, tag, norm_between, nullptr);
            norm = norm_of(2 * layer + 2), bias = first_bias_of(layer + 1);
            if (!finish<GATE_UP>(layer)) return false;
            // Of this step's keys and values, before its last sums.
            if (layer + 1 == p.layers) fence();
            stage_gated();
            if (!finish<DOWN>(layer)) return false;
        }
        const Active active = active_in(step);
        uint4 values[4], more[4];
        if (p.heads) load_head(active, head_row(warp), values), load_head(active, head_row(warp + warps), more);
        float noises[2][4];
        if (p.heads)
            for (int k = 0; k < 2; ++k) load_noise(step, active, threadIdx.x + k * threads(), noises[k]);
        stage_residual(END, down, tag, norm, nullptr);
        __syncthreads();
        if (*stop) return false;
        note(END, 1);
        if (blockIdx.x == 0 && int(threadIdx.x) < quads) {
            const float scale = norm_scale();
            const uint16_t weights[4] = {uint16_t(norm.x), uint16_t(norm.x >> 16), uint16_t(norm.y),
                                         uint16_t(norm.y >> 16)};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int column = 4 * threadIdx.x + e;
                p.hidden[int64_t(step) * dim() + column] = narrow<Bfloat16>(residual[e] * scale * widen<Bfloat16>(weights[e]));
            }
        }
        if (p.heads) {
            make_logits(active, values, more);
            // After the step's last sums came, before a barrier and then the reads of what they tell of.
            fence();
            return draw(step, active, noises);
        }
        fence();
        __syncthreads();
        return true;
    }

    __device__ void run() {
        __syncthreads();
        list();
#pragma unroll 1
        for (int i = 0; i < DEPTH - (USUAL && PACED); ++i) ask();
        tag = load_relaxed(p.state);
        note(-1, 0);
        bool going = true;
        for (int i = 0; going && i < p.steps; ++i) going = step(i);
        cp_async_wait_group<0>();
        if (!going) return;
        // Every block has read the first tag before it published anything.
        if (blockIdx.x == 0 && threadIdx.x == 0) store_relaxed(p.state, tag);
        if (p.clocks)
            for (int i = threadIdx.x; i < NOTED * TIMES; i += threads())
                p.clocks[int64_t(blockIdx.x) * NOTED * TIMES + i] = times[i];
    }
};

}  // namespace
