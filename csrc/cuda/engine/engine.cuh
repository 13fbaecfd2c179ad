// The state of a block of the persistent engine, and how it goes through the phases; engine.cu explains them.
#pragma once

#include <engine/grid.cuh>

#include "../row_order.cuh"
#include "program.cuh"

namespace {

constexpr uint32_t PATIENCE = 1 << 20;
constexpr uint32_t NOT_THERE = 0xffffffff;   // a word of what has not been made yet
constexpr int PART_PIECES = 64;              // of 16 bytes: 16 rows of W, 64 bytes of each
constexpr int MOST_NORMED = 8192;            // columns of what is normed
constexpr int OWN_POSITIONS = 16, OWN_HEAD = 16, OWN_VALUES = 512;  // of `Program::own_cache`
constexpr int MOST_TOGETHER = 4;
constexpr int OWN_SCRATCH = (1 + MOST_TOGETHER) * OWN_HEAD;  // floats of a warp: q, new keys
constexpr int PARTS_OF_ROW = 8, LEAST_PART = 64;
constexpr int SPLIT_GROUPS = 16;             // of positions whose values are summed one after the other
// Of the table, in shared memory: while the next is copied, some threads may be at the last phase's end still.
constexpr int PHASES = 3;
constexpr int SEVERAL = -1;                  // of `Share::second`
constexpr int DRAWN = 4;                     // columns of a code that was drawn

// Whose phases a kernel has the code of: the transformers', or those of codec.cuh without or with those of frames.cuh.
enum Kind { TRANSFORMER, STREAMS, FRAMES };

// What a block has of a product, whatever the step.
struct Share {
    uint16_t classes;   // of units of K
    uint16_t units;     // of K
    uint16_t together;  // tiles whose sums fit into a buffer
    uint16_t own;       // tiles
    int32_t pieces;     // of 16 bytes in a row of W
    // Of tiles that are alike: the first row of W of the first, how far on that of the next begins, and a tile's second
    // octet behind its first; `second` is 0 where it has one only, and SEVERAL where tiles are not alike.
    int32_t row, to_next, second;
};

__host__ __device__ inline int sums_stride(int rows) { return rows == 1 ? 16 : 20; }  // floats of a column: no bank twice
__host__ __device__ inline int sums_of_task(int rows) { return rows * sums_stride(rows); }

// Where things lie in a block's shared memory, as bytes from its begin.
struct Places {
    int scales, x, sums, squares, sums_x, norms, own, new_heads, matrices, shares, phases, groups, now, began, program, total;

    __host__ __device__ Places(const Program& p, int threads, int depth) {
        const int warps = threads / 32;
        int end = warps * depth * PART_PIECES * 16;  // the queues come first
        const auto take = [&end](int bytes) {
            const int begin = end;
            end += (bytes + 15) / 16 * 16;
            return begin;
        };
        const int x_bytes = p.x_columns * p.rows * 2;
        scales = take(p.stream_rows ? 0 : warps * depth * 32 * 4);
        x = take(x_bytes > p.scratch_bytes ? x_bytes : p.scratch_bytes);  // [block of columns, i, row, t] pieces
        // [2, tile, class, row of x, row of W]; of streams' rows [1, ...]
        sums = take((p.stream_rows ? 1 : 2) * p.sums_floats * 4);
        squares = take(MOST_NORMED / COLUMNS * MOST_ROWS * 4);  // [block of columns, row of x]
        sums_x = take(p.x_columns / COLUMNS * MOST_ROWS * 4);
        norms = take(MOST_ROWS * 4);
        own = take(p.together ? warps * OWN_SCRATCH * 4 : 0);
        new_heads = take(p.together ? MOST_ROWS * 9 * OWN_HEAD * 4 : 0);  // [row of x, q k v, columns of a job]
        matrices = take(p.count * int(sizeof(Matrix)));
        shares = take(p.count * int(sizeof(Share)));
        phases = take(PHASES * int(sizeof(Phase)));
        groups = take(warps * 16);
        now = take(warps * 12);
        began = take(8);
        program = take(p.groups ? int(sizeof(Program)) : 0);
        total = end;
    }
};

__device__ inline bool there(const uint2& piece) { return piece.x != NOT_THERE; }

template <class T, int DEPTH>
struct Engine {
    const Program& p;
    const Places& places;
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int blocks = gridDim.x, rows;

    // Shared memory, at places that the launch has: what is kept in a register is none of the multiplication's.
    template <class Value>
    __device__ static Value* at(int place) { return reinterpret_cast<Value*>(dynamic_shared() + place); }
    __device__ uint4* fifo() const { return at<uint4>(0); }  // [warps, DEPTH, 2 octets, 32]
    // [warps, DEPTH, scales and zeros, 2 octets, 8]: words that hold them
    __device__ uint32_t* fifo_scales() const { return at<uint32_t>(places.scales); }
    __device__ uint4* x() const { return at<uint4>(places.x); }
    __device__ float* sums() const { return at<float>(places.sums); }
    __device__ float* squares() const { return at<float>(places.squares); }
    __device__ float* sums_x() const { return at<float>(places.sums_x); }
    __device__ float* norms() const { return at<float>(places.norms); }
    __device__ float* own() const { return at<float>(places.own); }
    __device__ float* new_heads() const { return at<float>(places.new_heads); }
    __device__ Matrix* matrices() const { return at<Matrix>(places.matrices); }
    __device__ Share* shares() const { return at<Share>(places.shares); }
    __device__ Phase* phases() const { return at<Phase>(places.phases); }

    int buffer = 0;             // of sums
    mutable bool lost = false;  // whether this thread has waited in vain

    // The next part of a unit that this warp asks for.
    struct Walk {
        int phase;              // `count` after the last
        int tile, of_class, unit, part;
        int upper, lower;       // rows of W of this lane, as 16-byte pieces from its begin; lower < 0: none
        int scale_row;          // of W, that this lane asks for a scale or zero of
    } walk;
    // Where this warp is: the place of its phase in shared memory, the phase's number, and that of the step.
    struct Now {
        int place, index, step;
    };
    // What the walk looks at once a unit: the step; of the group of tiles, its first and their number; the first unit of the
    // columns that x has.
    struct Group {
        int step, tile0, tiles, chunk;
    };
    int ask_slot = 0, slot = 0;

    // What a register is not spent on. Lane 0 writes it, when all lanes have read it.
    __device__ Group& group() const { return at<Group>(places.groups)[warp]; }
    __device__ Now& now() const { return at<Now>(places.now)[warp]; }
    template <class Value>
    __device__ void keep(Value& place, const Value& value) const {
        sync_warp();
        if (lane == 0) place = value;
        sync_warp();
    }

    __device__ Engine(const Program& p, const Places& places) : p(p), places(places), rows(p.rows) {}

    // ---- Phases

    // The phase after this one. False after the last.
    __device__ bool advance(int& phase, int& step) const {
        if (++phase == p.loop_end && step + 1 < p.steps) phase = p.loop_begin, ++step;
        return phase < p.count;
    }

    // Where a vector begins that is made in, or for, this step.
    __device__ uint16_t* vector(int number, int step, bool outside) const {
        return p.exchanged + (int64_t(number) + (outside ? 0 : int64_t(step) * p.loop_columns)) * rows;
    }
    __device__ uint16_t* from_of(const Phase& phase) const {
        return vector(phase.from, now().step, phase.from_prologue & 1);
    }
    __device__ uint16_t* to_of(const Phase& phase) const {
        return vector(phase.to, now().step + (phase.from_prologue >> 2 & 1), false);
    }

    // By the last warp first: it has the least to do with x.
    __device__ void copy_words(const void* from, void* to, int bytes) const {
        for (int i = blockDim.x - 1 - threadIdx.x; i < bytes / 4; i += blockDim.x)
            static_cast<uint32_t*>(to)[i] = static_cast<const uint32_t*>(from)[i];
    }

    // What the next phase needs from memory, into L1 while this one ends; after a barrier.
    __device__ void prefetch() const {
        Now next = now();
        if (!advance(next.index, next.step)) return;
        const Phase& phase = phases()[after(next.place)];
        const int lines = phase.norm ? (phase.columns + 63) / 64 : 0;
        for (int i = threadIdx.x; i < lines; i += blockDim.x) prefetch_l1(phase.norm + i * 64);
        const int biases = phase.bias ? (matrices()[next.index].n + 63) / 64 : 0;
        for (int i = threadIdx.x; i < biases; i += blockDim.x) prefetch_l1(phase.bias + i * 64);
    }

    __device__ static int after(int place) { return place + 1 == PHASES ? 0 : place + 1; }

    // False if all are to leave.
    template <Kind KIND>
    __device__ __forceinline__ bool run() {
        copy_words(p.matrices, matrices(), p.count * int(sizeof(Matrix)));
        copy_words(p.phases, phases(), int(sizeof(Phase)));
        __syncthreads();
        for (int i = threadIdx.x; i < p.count; i += blockDim.x) shares()[i] = share_of(matrices()[i]);
        __syncthreads();
        begin();
        ask(DEPTH);
        keep(now(), Now{});
        bool going = true;
#pragma unroll 1
        for (bool more = true; more && going;) {
            Now next = now();
            if (advance(next.index, next.step))
                copy_words(p.phases + next.index, phases() + after(next.place), int(sizeof(Phase)));
            going = phase<KIND>(phases()[now().place]);
            next = now();
            more = advance(next.index, next.step);
            next.place = after(next.place);
            keep(now(), next);
        }
        cp_async_wait_group<0>();
        return going;
    }

    // Ends after a barrier that all threads came to after the next phase was copied. False if all are to leave.
    template <Kind KIND>
    __device__ __forceinline__ bool phase(const Phase& phase) {
        if (p.clocks && threadIdx.x == 0) *at<int64_t>(places.began) = clocks_now();
        bool going = true;
        if constexpr (KIND == STREAMS) {
            going = phase.operation == ATTEND_RING ? attend_ring(phase) : product_of_rows(phase);
        } else if constexpr (KIND == FRAMES) {
            going = phase.operation == ATTEND_FRAMES ? attend_frames(phase) : product_of_rows(phase);
        } else switch (phase.operation) {
            case PRODUCT: going = product(phase); break;
            case NORMALIZE: going = normalize(phase); break;
            case ATTEND: going = attend(phase); break;
            case DRAW: going = draw(phase); break;
            case EMBED: going = embed(phase); break;
            case TEXT: __syncthreads(); break;  // `draw_text` follows
        }
        if (p.clocks && threadIdx.x == 0) p.clocks[int64_t(blockIdx.x) * p.count + now().index] += clocks_now() - *at<int64_t>(places.began);
        return going;
    }

    // ---- What blocks exchange

    // Whether to go on looking: everybody leaves once somebody has lost patience.
    __device__ bool patient(uint32_t looks) const {
        look_again(p.pause);
        if (looks % 1024) return true;
        if (looks >= PATIENCE) store_relaxed(p.error, 1);
        if (!load_relaxed(p.error)) return true;
        lost = true;
        return false;
    }

    // A barrier. False if a thread of the block has waited in vain: then all leave.
    __device__ bool together() const { return !any_of_block(lost); }

    // Four columns.
    __device__ uint2 wait_for(const uint16_t* from) const {
        const uint2* const at = reinterpret_cast<const uint2*>(from);
        uint2 piece = load_relaxed(at);
#pragma unroll 1
        for (uint32_t looks = 1; !there(piece) && patient(looks); ++looks) piece = load_relaxed(at);
        return piece;
    }

    // Twice four columns; both are asked for before either is waited for.
    __device__ void wait_for(const uint16_t* from, const uint16_t* other, uint2& piece, uint2& second) const {
        const uint2 *const at = reinterpret_cast<const uint2*>(from), *const at2 = reinterpret_cast<const uint2*>(other);
        piece = load_relaxed(at), second = load_relaxed(at2);
#pragma unroll 1
        for (uint32_t looks = 1; !(there(piece) && there(second)) && patient(looks); ++looks) {
            if (!there(piece)) piece = load_relaxed(at);
            if (!there(second)) second = load_relaxed(at2);
        }
    }

    __device__ static void put(void* to, uint2 piece) {
        if (!there(piece)) piece.x = 0x7fff7fff;  // another NaN
        store_relaxed(static_cast<uint2*>(to), piece);
    }

    // The values of four neighbouring lanes, put by the first of them. All lanes of the warp call this.
    __device__ void put_four(uint16_t* to, uint16_t value, bool real) const {
        const uint32_t mine = value;
        const uint32_t pair = mine | float_bits(shfl_xor(bits_float(mine), 1)) << 16;
        const uint32_t other = float_bits(shfl_xor(bits_float(pair), 2));
        if (lane % 4 == 0 && real) put(to, make_uint2(pair, other));
    }

    __device__ static float value_of(const uint2& piece, int i) {
        return widen<T>(uint16_t((i < 2 ? piece.x : piece.y) >> i % 2 * 16));
    }

    // stream.cuh
    __device__ Share share_of(const Matrix& matrix) const;
    __device__ int own_tiles(const Matrix& matrix, const Share& share, int step) const;
    __device__ int weight_row(const Matrix& matrix, int step, int tile, int half, int within) const;
    __device__ void begin();
    __device__ void begin_columns();
    __device__ int end_of_columns(const Share& share, int chunk) const {
        const int end = chunk + p.x_columns / COLUMNS;
        return end < share.units ? end : share.units;
    }
    __device__ void settle();
    __device__ void find_rows();
    __device__ void ask(int count);

    // product.cuh
    struct Source;
    struct Item;
    struct Ahead {
        uint16_t bias;
        uint2 residual;
    };
    template <class F, class Of>
    __device__ void each_eight(int xs, int first, int count, Of of) const;
    template <class F>
    __device__ void stage(const Phase& phase, int first, int count);
    template <class F>
    __device__ void stage_quarters(const Phase& phase, const Source& source, int xs, int first, int count);
    template <class F>
    __device__ void stage_words(const Phase& phase, const Source& source, int xs, int first, int count);
    __device__ void square_rows(const Phase& phase);
    template <class F>
    __device__ void add_unit(const Matrix& matrix, int unit, int parity, int xs, float (&total)[4]);
    template <class F>
    __device__ void multiply(const Matrix& matrix, const Share& share, int tiles, int chunk, int xs, float* to);
    template <class F>
    __device__ bool product_of_form(const Phase& phase);
    __device__ bool product(const Phase& phase);
    __device__ void find_norms(const Phase& phase);
    __device__ int items(const Phase& phase, const Matrix& matrix, int tiles) const;
    __device__ Ahead look_ahead(const Phase& phase, const Matrix& matrix, int tile0, int tiles) const;
    __device__ float sum_of(const Share& share, const float* from, int tile, int m, int row) const;
    __device__ void publish(const Phase& phase, const Matrix& matrix, const Share& share, int tile0, int tiles,
                            const float* from, const Ahead& first);
    __device__ const uint16_t* residual_from(const Phase& phase) const {
        return vector(phase.residual, now().step, phase.from_prologue & 2);
    }
    __device__ float residual_of(const Phase& phase, const Item& item, const uint2& before) const;
    __device__ bool normalize(const Phase& phase);

    // patch_attention.cuh
    __device__ uint16_t* own_cache_of(int layer, int head, int m) const {
        return p.own_cache + ((int64_t(layer) * p.heads + head) * rows + m) * OWN_VALUES;
    }
    __device__ void prefetch_own(const Phase& phase, const Matrix& matrix) const;
    __device__ void publish_heads(const Phase& phase, const Matrix& matrix, const Share& share, int tile0,
                                  int tiles, const float* from);
    __device__ void attend_own(const Phase& phase, int columns, int first, int within, int m);

    // split_attention.cuh
    struct Part;
    __device__ bool attend(const Phase& phase);
    __device__ float* part_of(const Phase& phase, const Part& part, int number) const;
    __device__ bool attend_part(const Phase& phase, const Part& part);
    __device__ void merge_parts(const Phase& phase, const Part& part);

    // codes.cuh
    struct Channel;
    __device__ bool draw(const Phase& phase);
    __device__ bool embed(const Phase& phase);

    // codec.cuh
    __device__ static float gelu_of(float value);
    __device__ bool stage_rows(const Phase& phase, int first, int count);
    template <int TILES>
    __device__ void add_unit_to_tiles(int unit, bool first, float* sums_of_class);
    template <int TILES>
    __device__ void multiply_tiles(const Share& share, int tiles, int chunk);
    template <int TILES>
    __device__ bool product_of_tiles(const Phase& phase);
    __device__ bool product_of_rows(const Phase& phase);

    // ring_attention.cuh
    struct Ring;
    __device__ bool attend_ring(const Phase& phase);
    __device__ bool bring_heads(const Phase& phase, const Ring& ring, uint16_t* to);
    __device__ void attend_queries(const Phase& phase, const Ring& ring, const uint16_t* fresh, int first);

    // frames.cuh
    __device__ static const Program& of_group(const Program& all, const Places& places);
    __device__ bool attend_frames(const Phase& phase);

    // text_passes.cuh, text.cuh
    struct TextPasses;
    struct Text;
    __device__ void draw_text() const;
};

}  // namespace
