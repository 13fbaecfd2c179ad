// The patch decoder as one persistent kernel: all layers of all steps, one row, int8 or int4 weights on tensor cores.
//
// Every block runs through the same phases of a layer. What a phase makes is exchanged through global memory, and the
// data carries the flag: a piece of 16 bytes is four float32 whose lowest four bits are a nibble each of a 16-bit tag
// (a relative error of 2^-20), stored and loaded as one access; a reader looks until the tag is the one it waits for.
//
//   phase     jobs           units of a job            made                           read by every block
//   QKV       2 heads        3 tiles x half of K       partial q, k, v of a head      of the heads that its OUT jobs need
//   OUT       2 D / 16       1 tile x half of K        partial sums                   all
//   GATE_UP   F / 16         2 tiles x K               silu(gate) up                  of the half that its DOWN jobs need
//   DOWN      2 D / 16       1 tile x half of K        partial sums                   all
//
// A tile is 16 rows, a unit 16 rows x 128 columns. Job j is done by block j % blocks, unit i of a block's phase by one of
// its warps, so any number of blocks up to that of the jobs works. Which units a sum has, and their order, depend on the
// weight alone. Each block attends for all heads that it needs itself, and holds the residual, a quad of columns a
// thread, in registers.
//
// A step ends with the norm and, where heads are given, with the logits of its active channels, exchanged like the rest;
// every block then draws all codes itself (the greatest logit / temperature + noise) and sums their embeddings, which is
// the next step's input. Channel c makes the code of frame t - c in step t.
//
// Why a buffer of each kind is enough: a block writes a buffer in layer n + 1 after it has read, complete, the sums of an
// OUT or DOWN phase that came after the buffer's phase of layer n; every block has jobs in both, and publishes their sums
// after it has read what came before. So nobody still reads what is overwritten. Tags go up by one a layer: what a
// buffer holds from before is never taken for new.
//
// Weights come by copies to shared memory: a FIFO for each thread of what it asked for itself, DEPTH units ahead across
// phases, layers and steps; so the stream does not stop while blocks wait for each other. Keys and values of earlier
// positions are in global memory, written by one block a head. They are read in later steps only: one fence a step, by
// their writers before they publish the step's last sums and by readers after they have got those.

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

__device__ inline uint32_t pair(uint32_t word, int shift) { return and_or(word >> shift, HALVES, MAGIC); }

// Two q + 128 of a word, at bits 0 and 16, as two q: 128 and the low seven bits, less 128 or 256.
__device__ inline uint32_t byte_pair(uint32_t word) {
    return add_two(and_or(word, 0x007f007f, MAGIC), not_and_or(word, 0x00800080, 0xc300c300));
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
        kept = p.keep < 0 ? policy_of_others() : policy_to_keep();
        others = p.keep < 0 ? policy_of_others() : policy_to_drop();
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

    __device__ void plan() {
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
    __device__ void list() {
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
        warp_barrier();
    }

    __device__ void ask() {
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
        commit_copies();
        ask_slot = ask_slot + 1 == DEPTH ? 0 : ask_slot + 1;
    }

    // The sums of this warp's next unit, asked for with at least LEFT after it.
    template <int LEFT>
    __device__ void multiply_next() {
        const Unit now = units[unit];
        wait_for_copies<LEFT>();
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
    template <int WHICH>
    __device__ void multiply() {
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

    __device__ void multiply_unit(const uint4* from, const uint2 scale, int block, float* to) {
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
                    multiply_add(some[i], byte_pair(up), byte_pair(low), byte_pair(up >> 8), byte_pair(low >> 8),
                                 part_of(both, i % 2 * 2), part_of(both, i % 2 * 2 + 1));
                }
        } else {
#pragma unroll
            for (int s = 0; s < 4; s += 2)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint32_t up = part_of(upper[0], i), low = part_of(lower[0], i);
                    multiply_add(some[i], pair(up, 4 * s), pair(low, 4 * s), pair(up, 4 * s + 4), pair(low, 4 * s + 4),
                                 part_of(values[i], s), part_of(values[i], s + 1));
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
                to[half * 8 + g] = from_bfloat16(uint16_t(both)) * sum;
            }
        }
    }

    // Looks at a piece, and another, until both are of this tag. False if somebody has lost patience: then all leave.
    __device__ bool get(const uint4* from, const uint4* other, uint32_t tag, uint4& piece, uint4& second) {
        piece = load_relaxed(from), second = load_relaxed(other);
#pragma unroll 1
        for (uint32_t looks = 1;; ++looks) {
            const bool come = is_of(piece, tag), second_come = is_of(second, tag);
            if (come && second_come) return true;
            if (p.without & 1) return true;
            if (looks % 1024 == 0) {
                if (looks >= PATIENCE) store_relaxed(p.state + 32, 1);
                if (load_relaxed(p.state + 32)) {
                    *stop = 1;
                    return false;
                }
            }
            look_again(p.pause);
            if (!come) piece = load_relaxed(from);
            if (!second_come) second = load_relaxed(other);
        }
    }

    __device__ bool get(const uint4* from, uint32_t tag, uint4& piece) {
        piece = load_relaxed(from);
#pragma unroll 1
        for (uint32_t looks = 1;; ++looks) {
            if (is_of(piece, tag) || p.without & 1) return true;
            if (looks % 1024 == 0) {
                if (looks >= PATIENCE) store_relaxed(p.state + 32, 1);
                if (load_relaxed(p.state + 32)) {
                    *stop = 1;
                    return false;
                }
            }
            look_again(p.pause);
            piece = load_relaxed(from);
        }
    }

    // Of norm i, what this thread multiplies with. Weights like these come from DRAM: they are asked for phases ahead.
    __device__ uint2 norm_of(int i) const {
        if (int(threadIdx.x) >= quads || i > 2 * p.layers) return make_uint2(0, 0);
        return reinterpret_cast<const uint2*>(p.norms + int64_t(i) * dim())[threadIdx.x];
    }

    // The last sums to the residual, then x = norm weight times it, rounded; without its scale, which comes last.
    __device__ void stage_residual(int which, const uint4* partial, uint32_t tag, const uint2 weight,
                                   const uint16_t* input) {
        const int i = threadIdx.x;
        if (i >= quads) return;
        if (input) {
            const uint2 given = load_shared_data(reinterpret_cast<const uint2*>(input) + i);
            residual[0] = from_bfloat16(uint16_t(given.x)), residual[1] = from_bfloat16(uint16_t(given.x >> 16));
            residual[2] = from_bfloat16(uint16_t(given.y)), residual[3] = from_bfloat16(uint16_t(given.y >> 16));
        } else if (partial) {
            uint4 first, second;
            get(partial + i, partial + quads + i, tag, first, second);
            float a[4], b[4];
            note(which, 0);
            untag(first, a), untag(second, b);
#pragma unroll
            for (int e = 0; e < 4; ++e) residual[e] += a[e] + b[e];
        }
        float square = 0, sum = 0;
        uint16_t* place = x + (which == END ? 4 * threadIdx.x : place_of<BITS>(4 * threadIdx.x));
        const uint16_t weights[4] = {uint16_t(weight.x), uint16_t(weight.x >> 16), uint16_t(weight.y),
                                     uint16_t(weight.y >> 16)};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            square += residual[e] * residual[e];
            const uint16_t value = to_bfloat16(residual[e] * from_bfloat16(weights[e]));
            sum += from_bfloat16(value);
            place[which == END ? e : place_after<BITS>(e)] = value;
        }
        if (SUM_X && which != END) {
            sum += from_lane_xor(sum, 1), sum += from_lane_xor(sum, 2);
            if (i % 4 == 0) x_sums[i / 4] = sum;
        }
#pragma unroll
        for (int mask = 1; mask < 32; mask *= 2) square += from_lane_xor(square, mask);
        if (i % 32 == 0) squares[i / 32] = square;
    }

    __device__ float norm_scale() const {
        float square = 0;
#pragma unroll 8
        for (int i = 0; i < dim() / COLUMNS; ++i) square += squares[i];
        return rsqrtf(square / dim() + p.eps);
    }

    __device__ void stage_gated() {
        const int half = ffn() / 8;
        for (int h = 0; h < 2; ++h) {
            if (!(needs >> h & 1)) continue;
            for (int i = h * half + threadIdx.x; i < (h + 1) * half; i += threads()) {
                uint4 piece;
                get(gated + i, tag, piece);
                note(DOWN, 0);
                float values[4], sum = 0;
                uint16_t* place = x + place_of<BITS>(4 * uint32_t(i));
                untag(piece, values);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const uint16_t value = to_bfloat16(values[e]);
                    sum += from_bfloat16(value);
                    place[place_after<BITS>(e)] = value;
                }
                if (SUM_X) {
                    sum += from_lane_xor(sum, 1), sum += from_lane_xor(sum, 2);
                    if (i % 4 == 0) x_sums[i / 4] = sum;
                }
            }
        }
    }

    // Of two heads, lane d of 16 of each: the key of position d, rubbish where none is yet; value d of all positions, zeros
    // where none is.
    struct Past {
        uint4 keys[2], values[2];
    };

    __device__ uint16_t* cache_of(int layer, int head) const {
        return p.cache + (int64_t(layer) * heads + head) * POSITIONS * 2 * HEAD;
    }

    __device__ int first_pair() const { return needs & 1 ? 0 : heads / 4; }

    __device__ void load_past(int layer, int position, int pair, Past& past) const {
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
    __device__ void stage_attention(int layer, int position, Past& past) {
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
            warp_barrier();
            untag(piece, *reinterpret_cast<float(*)[4]>(own + 4 * lane));
            if (lane < 16) untag(second, *reinterpret_cast<float(*)[4]>(own + 4 * (lane + 32)));
            warp_barrier();
            const auto joined = [&](int part) {
                const float* at = own + sub * 6 * HEAD + part * HEAD + d;
                return from_bfloat16(to_bfloat16(at[0] + at[3 * HEAD]));
            };
            float q = joined(0), k = joined(1);
            const uint16_t v = to_bfloat16(joined(2));
            const float cosine = angles[position * HEAD + d % 8], sine = angles[position * HEAD + 8 + d % 8];
            const float other_q = from_lane_xor(q, 8), other_k = from_lane_xor(k, 8);
            q = q * cosine + (d < 8 ? -other_q : other_q) * sine;
            const uint16_t key = to_bfloat16(k * cosine + (d < 8 ? -other_k : other_k) * sine);
            warp_barrier();
            own[sub * 6 * HEAD + d] = q;
            const uint4* new_key = reinterpret_cast<const uint4*>(own + sub * 6 * HEAD + HEAD);
            const_cast<uint16_t*>(reinterpret_cast<const uint16_t*>(new_key))[d] = key;
            warp_barrier();
            if (d == position) keys[0] = new_key[0], keys[1] = new_key[1];
            float score = 0;
#pragma unroll
            for (int e = 0; e < HEAD; e += 4) {
                float some[4];
                load_four(own + sub * 6 * HEAD + e, some);
#pragma unroll
                for (int f = 0; f < 4; ++f) {
                    const uint32_t two = part_of(keys[e / 8], e % 8 / 2 + f / 2);
                    score += some[f] * from_bfloat16(uint16_t(two >> f % 2 * 16));
                }
            }
            score = d <= position ? score * 0.25f : -INFINITY;
            float most = score;
#pragma unroll
            for (int mask = 1; mask < 16; mask *= 2) most = fmaxf(most, from_lane_xor(most, mask));
            float weight = d <= position ? fast_exp(score - most) : 0, all = weight;
#pragma unroll
            for (int mask = 1; mask < 16; mask *= 2) all += from_lane_xor(all, mask);
            weight = fast_divide(weight, all);
            float* shares = own + sub * 6 * HEAD + 2 * HEAD;
            // The block that keeps this position's value may have written it already: it counts once.
            shares[d] = d == position ? 0 : weight;
            if (d == position) shares[HEAD] = weight;
            warp_barrier();
            float sum = 0;
#pragma unroll
            for (int j = 0; j < POSITIONS; j += 4) {
                float some[4];
                load_four(shares + j, some);
#pragma unroll
                for (int f = 0; f < 4; ++f) {
                    const uint32_t two = part_of(past.values[j / 8], j % 8 / 2 + f / 2);
                    sum += some[f] * from_bfloat16(uint16_t(two >> f % 2 * 16));
                }
            }
            sum += shares[HEAD] * from_bfloat16(v);
            const uint16_t result = to_bfloat16(sum);
            x[place_of<BITS>(head * HEAD + d)] = result;
            if (SUM_X) {
                float plain = from_bfloat16(result);
#pragma unroll
                for (int mask = 1; mask < 16; mask *= 2) plain += from_lane_xor(plain, mask);
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

    // The four sums of a quad of rows, over units first, ..., in order.
    __device__ void add(int first, int inner, int quad, float (&total)[4]) const {
#pragma unroll
        for (int e = 0; e < 4; ++e) total[e] = 0;
#pragma unroll 16
        for (int i = 0; i < inner; ++i) {
            float more[4];
            load_four(sums + (first + i) * TILE + quad * 4, more);
#pragma unroll
            for (int e = 0; e < 4; ++e) total[e] += more[e];
        }
    }

    __device__ void put(uint4* to, const float (&values)[4]) const {
        store_relaxed(to, make_uint4(tagged(values[0], tag, 0), tagged(values[1], tag, 1), tagged(values[2], tag, 2),
                                     tagged(values[3], tag, 3)));
    }

    __device__ const uint2* bias_of(int layer, uint32_t i) const {
        const uint32_t job = blockIdx.x + i / 12 * blocks(), row = i % 12 / 4 * dim() + job / 2 * HEAD + i % 4 * 4;
        return reinterpret_cast<const uint2*>(p.bias + int64_t(layer) * 3 * dim() + row);
    }

    // silu(gate) up of this block's jobs, a row a lane of its first warp.
    __device__ void publish_gated(float scale) {
        if (warp) return;
        const uint32_t inner = inner_of(GATE_UP), all = own_of(GATE_UP) * TILE;
        for (uint32_t start = 0; start < all; start += 32) {
            const uint32_t i = start + lane < all ? start + lane : 0, own = i / TILE, row = i % TILE;
            const float* from = sums + own * 2 * inner * TILE + row;
            float gate = 0, up = 0;
#pragma unroll 8
            for (uint32_t k = 0; k < inner; ++k) gate += from[k * TILE], up += from[(inner + k) * TILE];
            const float value = silu(gate * scale) * (up * scale);
            float four[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) four[e] = from_lane(value, lane / 4 * 4 + e);
            const uint32_t job = blockIdx.x + own * blocks();
            if (start + lane < all && lane % 4 == 0) put(gated + job * 4 + row / 4, four);
        }
    }

    template <int WHICH>
    __device__ void publish(int layer, const uint2 first_bias, float scale) {
        if constexpr (WHICH == GATE_UP) return publish_gated(scale);
        constexpr int EACH = WHICH == QKV ? 12 : 4;
        const uint32_t inner = inner_of(WHICH), units = inner * tiles_of(WHICH), all = own_of(WHICH) * EACH;
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < all; i += USUAL ? all : threads()) {
            const uint32_t own = USUAL ? 0 : i / EACH, place = USUAL ? i : i % EACH, tile = place / 4, quad = i % 4;
            const uint32_t job = blockIdx.x + own * blocks(), half = job % 2;
            float total[4];
            add(own * units + tile * inner, inner, quad, total);
            if (WHICH == QKV) {
                const uint2 both = USUAL || i == uint32_t(threadIdx.x) ? first_bias : *bias_of(layer, i);
                const uint16_t bias[4] = {uint16_t(both.x), uint16_t(both.x >> 16), uint16_t(both.y),
                                          uint16_t(both.y >> 16)};
#pragma unroll
                for (int e = 0; e < 4; ++e) total[e] = total[e] * scale + (half ? 0 : from_bfloat16(bias[e]));
                put(qkv + job * 12 + place, total);
            } else {
                put((WHICH == OUT ? out : down) + half * quads + job / 2 * 4 + quad, total);
            }
        }
    }

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

    // Eight products of bfloat16.
    static __device__ float dot(const uint4& a, const uint4& b) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t v = part_of(a, i), w = part_of(b, i);
            sum += from_bfloat16(uint16_t(v)) * from_bfloat16(uint16_t(w));
            sum += from_bfloat16(uint16_t(v >> 16)) * from_bfloat16(uint16_t(w >> 16));
        }
        return sum;
    }

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

    __device__ void load_head(const Active& active, int row, uint4 (&values)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            values[i] = make_uint4(0, 0, 0, 0);
            if (row < active.rows && i * 256 < dim())
                values[i] = reinterpret_cast<const uint4*>(p.heads + int64_t(active.first + row) * dim())[i * 32 + lane];
        }
    }

    // Logits of this block's rows to `sums`, published by fours; `values` and `more` are those of this warp's first two.
    __device__ void make_logits(const Active& active, uint4 (&values)[4], const uint4 (&more)[4]) {
        const float scale = norm_scale();
        const int fours = (active.rows + 3) / 4, own = (fours - int(blockIdx.x) + blocks() - 1) / blocks();
#pragma unroll 1
        for (int i = warp; i < own * 4; i += warps) {
            if (i == warp + warps)
#pragma unroll
                for (int j = 0; j < 4; ++j) values[j] = more[j];
            else if (i != warp)
                load_head(active, head_row(i), values);
            float sum = 0;
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (j * 256 < dim()) sum += dot(values[j], reinterpret_cast<const uint4*>(x)[j * 32 + lane]);
            for (int mask = 1; mask < 32; mask *= 2) sum += from_lane_xor(sum, mask);
            if (lane == 0) sums[i] = head_row(i) < active.rows ? from_bfloat16(to_bfloat16(sum * scale)) : -INFINITY;
        }
        __syncthreads();
        note(END, 2);
#pragma unroll 1
        for (int i = threadIdx.x; i < own; i += threads()) {
            float four[4];
            load_four(sums + 4 * i, four);
            put(logits + blockIdx.x + i * blocks(), four);
        }
        note(END, 3);
    }

    // Of rows 4 i ... 4 i + 3 of this step's, zeros for those that there are not.
    __device__ void load_noise(int step, const Active& active, int i, float (&noise)[4]) const {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int row = 4 * i + e;
            noise[e] = 0;
            if (p.noise == nullptr || row >= active.rows) continue;
            int channel = active.low;
#pragma unroll
            for (int a = 1; a < FRAMES; ++a)
                if (active.low + a < active.high && active.first + row >= p.firsts[active.low + a]) channel = active.low + a;
            noise[e] = p.noise[int64_t(step - channel) * p.firsts[p.channels] + active.first + row];
        }
    }

    // Draws this step's codes from all logits; the residual is the sum of their embeddings, rounded. False: all leave.
    // `noises`: of this thread's first two pieces.
    __device__ bool draw(int step, const Active& active, const float (&noises)[2][4]) {
        const int fours = (active.rows + 3) / 4;
        uint32_t best[FRAMES] = {}, code[FRAMES] = {};
        int seen = 0;
#pragma unroll 1
        for (int i = threadIdx.x; i < fours; i += threads(), ++seen) {
            float noise[4];
            if (seen < 2) {
#pragma unroll
                for (int e = 0; e < 4; ++e) noise[e] = seen ? noises[1][e] : noises[0][e];
            } else {
                load_noise(step, active, i, noise);
            }
            uint4 piece;
            get(logits + i, tag, piece);
            note(DRAW, 0);
            float values[4];
            untag(piece, values);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = active.first + 4 * i + e;
                int mine = 0;
#pragma unroll
                for (int a = 1; a < FRAMES; ++a)
                    if (active.low + a < active.high && row >= p.firsts[active.low + a]) mine = a;
                const uint32_t id = row - p.firsts[active.low + mine];
                const float score = values[e] * p.per_temperature + noise[e];
                const uint32_t rank = id == uint32_t(p.empty[active.low + mine]) ? 1 : ordered(score);
                if (4 * i + e >= active.rows) continue;
#pragma unroll
                for (int a = 0; a < FRAMES; ++a)
                    if (a == mine && rank > best[a]) best[a] = rank, code[a] = id;
            }
        }
        // Of equal ones the first code: threads, and each its own, go up by rows.
#pragma unroll
        for (int a = 0; a < FRAMES; ++a) {
            const uint32_t most = greatest_of_warp(best[a]);
            const uint32_t first = ~greatest_of_warp(best[a] == most ? ~code[a] : 0);
            if (lane == 0) bests[a * 64 + warp] = most, bests[a * 64 + 32 + warp] = first;
        }
        __syncthreads();
        if (*stop) return false;
        const int i = threadIdx.x;
        uint2 fours_of[FRAMES];
        // All are asked for before the first is waited for.
#pragma unroll
        for (int a = 0; a < FRAMES; ++a) {
            const int channel = active.low + a;
            fours_of[a] = make_uint2(0, 0);
            if (channel >= active.high) continue;
            const uint32_t mine = lane < warps ? bests[a * 64 + lane] : 0;
            const uint32_t most = greatest_of_warp(mine);
            const uint32_t drawn = ~greatest_of_warp(lane < warps && mine == most ? ~bests[a * 64 + 32 + lane] : 0);
            if (blockIdx.x == 0 && i == 0) p.codes[channel * FRAMES + step - channel] = drawn;
            if (i < quads)
                fours_of[a] =
                    reinterpret_cast<const uint2*>(p.embeddings + int64_t(p.firsts[channel] + drawn) * dim())[i];
        }
        float total[4] = {};
#pragma unroll
        for (int a = 0; a < FRAMES; ++a) {
            const uint2 four = fours_of[a];
            total[0] += from_bfloat16(uint16_t(four.x)), total[1] += from_bfloat16(uint16_t(four.x >> 16));
            total[2] += from_bfloat16(uint16_t(four.y)), total[3] += from_bfloat16(uint16_t(four.y >> 16));
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) residual[e] = from_bfloat16(to_bfloat16(total[e]));
        note(DRAW, 1);
        return true;
    }

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
                p.hidden[int64_t(step) * dim() + column] = to_bfloat16(residual[e] * scale * from_bfloat16(weights[e]));
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
        wait_for_copies<0>();
        if (!going) return;
        // Every block has read the first tag before it published anything.
        if (blockIdx.x == 0 && threadIdx.x == 0) store_relaxed(p.state, tag);
        if (p.clocks)
            for (int i = threadIdx.x; i < NOTED * TIMES; i += threads())
                p.clocks[int64_t(blockIdx.x) * NOTED * TIMES + i] = times[i];
    }
};

template <int BITS, int DEPTH, bool USUAL>
__global__ void __launch_bounds__(512) decode(const Decoder p) {
    DYNAMIC_SHARED(shared);
    Engine<BITS, DEPTH, USUAL> engine(p, shared);
    engine.run();
}

// Sets most_sums and most_units; bytes of shared memory.
int plan(Decoder& p, int bits, int depth, int blocks, int threads) {
    const int warps = threads / 32, widest = p.dim > p.ffn ? p.dim : p.ffn, k = p.dim / COLUMNS;
    const int jobs[PHASES] = {p.dim / 8, p.dim / 8, p.ffn / TILE, p.dim / 8};
    const int units[PHASES] = {3 * k / 2, k / 2, 2 * k, p.ffn / COLUMNS / 2};
    p.most_sums = p.most_units = 0;
    for (int i = 0; i < PHASES; ++i) {
        const int own = (jobs[i] + blocks - 1) / blocks * units[i];
        p.most_sums = own > p.most_sums ? own : p.most_sums;
        p.most_units += (own + warps - 1) / warps;
    }
    // Logits lie where sums do.
    const int rows = p.heads ? ((p.firsts[p.channels] + 3) / 4 + blocks - 1) / blocks * 4 : 0;
    p.most_sums = p.most_sums * TILE > rows ? p.most_sums : (rows + TILE - 1) / TILE;
    return warps * depth * (bits / 2 * 512 + 256) + NOTED * TIMES * 8 + widest * 2 + widest / 16 * 4 +
           (warps * 12 * HEAD + 32 + POSITIONS * HEAD + FRAMES * 64 + p.most_sums * TILE) * 4 +
           warps * (p.most_units * int(sizeof(Unit)) + PHASES * 4) + int(PHASES * sizeof(Phase)) + 16;
}

template <int BITS, int DEPTH>
int launch(Decoder p, int blocks, int threads, cudaStream_t stream) {
    const bool usual = blocks == USUAL_BLOCKS && threads == USUAL_THREADS && p.dim == USUAL_DIM && p.ffn == USUAL_FFN;
    const int shared = plan(p, BITS, DEPTH, blocks, threads);
    return start_together(usual ? decode<BITS, DEPTH, true> : decode<BITS, DEPTH, false>, blocks, threads, shared, stream, p);
}

constexpr int REFUSED = 1;  // cudaErrorInvalidValue

}  // namespace

// `steps` steps of one row, from position 0 on. dim and ffn are multiples of 256, heads are 16 wide; blocks at most
// min(dim / 8, ffn / 16), threads a multiple of 32 from dim / 4 to 512; depth 4, 5 or 8 for 8 bits, 4, 8, 10 or 16 for 4.
// With heads: sizes, empty int [channels] of the host; at most channels + 3 steps, dim at most 1024.
// Arrays: see `Decoder`. Returns a cudaError_t.
extern "C" int mimo_fast_engine_decode(
    const void* words, const void* scales, const void* norms, const void* bias, const void* angles, const void* inputs,
    const void* heads, const void* embeddings, const void* noise, void* codes, const int* sizes, const int* empty,
    int channels, float per_temperature, void* hidden, void* cache, void* exchanged, void* state, void* clocks, int dim, int ffn, int layers, int steps,
    int keep, int pause, int without, float eps, int bits, int depth, int blocks, int threads, cudaStream_t stream) {
    const auto as16 = [](const void* pointer) { return static_cast<const uint16_t*>(pointer); };
    Decoder p{static_cast<const uint4*>(words), static_cast<const uint2*>(scales), as16(norms), as16(bias),
              static_cast<const float*>(angles), as16(inputs), as16(heads), as16(embeddings),
              static_cast<const float*>(noise), static_cast<int*>(codes), static_cast<uint16_t*>(hidden),
              static_cast<uint16_t*>(cache), static_cast<uint4*>(exchanged), static_cast<uint32_t*>(state),
              static_cast<int64_t*>(clocks), dim, ffn, layers, steps, keep, pause, without, eps, per_temperature,
              channels, {}, {}, 0, 0};
    if (heads) {
        if (channels < 1 || channels > CHANNELS || steps > channels + FRAMES - 1 || dim > 1024) return REFUSED;
        for (int i = 0; i < channels; ++i) p.firsts[i + 1] = p.firsts[i] + sizes[i], p.empty[i] = empty[i];
    }
    if (dim % 256 || ffn % 256 || blocks < 1 || blocks > dim / 8 || blocks > ffn / TILE || threads % 32 ||
        threads * 4 < dim || threads > 512 || steps > POSITIONS)
        return REFUSED;
    switch (bits * 100 + depth) {
        case 804: return launch<8, 4>(p, blocks, threads, stream);
        case 404: return launch<4, 4>(p, blocks, threads, stream);
#ifndef FEW_DEPTHS
        case 408: return launch<4, 8>(p, blocks, threads, stream);
        case 805: return launch<8, 5>(p, blocks, threads, stream);
        case 808: return launch<8, 8>(p, blocks, threads, stream);
        case 410: return launch<4, 10>(p, blocks, threads, stream);
        case 416: return launch<4, 16>(p, blocks, threads, stream);
#endif
        default: return REFUSED;
    }
}
