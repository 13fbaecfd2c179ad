// A transformer, or all steps of a patch, as one persistent kernel: every layer, every product, attention, draws and
// embeddings in a single launch of one block of threads a multiprocessor.
//
// Why. At one row a layer is four products of a few microseconds. As kernels of their own they cost about 4 us each beyond
// the bytes of their weights: a launch, the first loads, the last stores, and no weights on their way meanwhile. Here the
// stream of weights never stops: while blocks wait for what others make, the next products' weights come.
//
//                 what one block does                                 what all blocks see (global memory)
//
//      weights ---> queue of each warp ----+
//      (asked for   DEPTH parts ahead,     |
//      in the       across products,       v
//      table's      layers, steps       multiply ---> sums ---> epilogues ---> piece of 4 values
//      order)                              ^          of 16      bias, norm's        |
//                                          |          classes    scale, SwiGLU,      v
//              stage: norm, sort <---------+--------- wait      residual      +---------------+
//                        ^                            for it        ^         | vector n      |  written once,
//                        |                              ^           |         | vector n + 1  |  each by the blocks
//                        +------------------------------+-----------+---------| ...           |  that make its parts
//                                                                             +---------------+
//
// The table. A launch goes through phases (program.cuh). Each reads one vector [rows, columns] and makes another: a product
// with its epilogues, a norm, attention, a draw of codes, their embeddings. Phases may repeat, as the steps of a patch.
// All blocks go through all phases; in each a block has every n-th job: tiles of 16 rows of W, heads, rows. Which block has
// a job decides about no bit of its result.
//
// How blocks wait for each other. Not by barriers over the grid, which cost a fence, an atomic and a second read: the data
// say themselves whether they are there. Before the launch all vectors are filled with ones; a word of ones is a NaN that
// nobody makes (`put` sees to that) and means "not there yet". A value is stored by one indivisible access of 8 bytes and
// read likewise, again and again until it is there (exchange in engine.cuh). Every vector is written once in a launch, and
// the steps of a loop have vectors of their own: nothing is used twice, so no block ever has to know that others have
// finished reading, there is no counter that could wrap, no fence, and no order of stores that would matter. Blocks never
// tell each other anything in another way. It takes 2 bytes a value and step: 2.5 MB a row for a patch.
//
//   no deadlock   a phase waits for vectors of earlier phases only, and all blocks run at once (a cooperative launch is
//                 refused otherwise). Who has waited for about a second says so in `Program::error`; everybody looks there
//                 at times and leaves. What the launch was to make had been filled with ones, too: NaN, and NOT_FINITE.
//
// Products. Units, their pairs and the order of sums are row_order.cuh's, so a row has the bits that it has in the other
// kernels, whatever the rows beside it, the grid or the division of shared memory. Weights are read as those kernels read
// them; there is no second copy. A block has whole sums, so nothing is added in an order that depends on time.
//
//   phase of a block    its tiles of 16 rows of W (8 where there are fewer tiles than blocks, or 8 of the gate and 8 of up)
//   task of a warp      a tile and a class of units; its sums stay in registers
//   queue of a warp     parts of 1 KB: 64 bytes of each of the tile's rows, by cp.async. Only the warp that asked for a part
//                       reads it, so the queue needs no barrier. The walk that asks (stream.cuh) goes through tiles, classes
//                       and units of all phases in the order of the multiplication, DEPTH parts before it.
//   x                   up to 8 rows, sorted for the tensor cores, in shared memory; where it does not fit, some columns
//                       after the others (stage and multiply take turns)
//   L2                  weights of a loop are marked to stay there as far as it holds them, the others to leave first
//
// Attention. Few positions (patch decoder, patch encoder): the block that has made a head's q, k and v attends for it; keys
// and values of earlier steps are its own and need no exchange (patch_attention.cuh). Long caches (backbone): jobs are
// parts of a row's positions, one block puts them together (split_attention.cuh).
//
// The codec. Its decoder has up to 32 rows, LayerNorm, GELU, and rings of keys and values (codec.cuh, ring_attention.cuh); its
// vocoder has any number of rows, in groups that are on their own but for attention (frames.cuh). Either is a kernel for
// itself, whose registers the transformers' phases do not share.
//
// The files, in the order in which data pass: program.cuh (the table), engine.cuh (phases, exchange), stream.cuh (weights),
// product.cuh (stage, multiply, publish), patch_attention.cuh, split_attention.cuh, codes.cuh (draw, embed), text_passes.cuh
// and text.cuh (the text's draw); codec.cuh, ring_attention.cuh, frames.cuh.
//
// Bytes and exchanges of the published model's tables, and what they are predicted to take: docs/performance.md. No GPU has
// run this kernel yet.

#include <type_traits>

#include "engine/codec.cuh"
#include "engine/codes.cuh"
#include "engine/frames.cuh"
#include "engine/patch_attention.cuh"
#include "engine/ring_attention.cuh"
#include "engine/split_attention.cuh"
#include "engine/text.cuh"

namespace {

struct Launch {
    Program program;
    Places places;
};

template <class T, int DEPTH, Kind KIND>
__global__ void __launch_bounds__(512, 1) engine(const __grid_constant__ Launch launch) {
    if constexpr (KIND == FRAMES) {
        Engine<T, DEPTH> own(Engine<T, DEPTH>::of_group(launch.program, launch.places), launch.places);
        own.template run<KIND>();
    } else {
        Engine<T, DEPTH> own(launch.program, launch.places);
        const bool going = own.template run<KIND>();
        if constexpr (KIND == TRANSFORMER)
            if (going && launch.program.tokens) Engine<T, DEPTH>(launch.program, launch.places).draw_text();
    }
}

template <class T, int DEPTH>
int launch(const Program& p, int blocks, int threads, cudaStream_t stream) {
    const Launch launch{p, Places(p, threads, DEPTH)};
    const auto start = [&](auto kernel, int groups) {
        return start_together(kernel, dim3(blocks, groups), threads, launch.places.total, stream, launch);
    };
    if (!p.stream_rows) return start(engine<T, DEPTH, TRANSFORMER>, 1);
    // A codec computes in bfloat16, or not here.
    if constexpr (std::is_same_v<T, Bfloat16>)
        return p.groups ? start(engine<T, DEPTH, FRAMES>, p.groups) : start(engine<T, DEPTH, STREAMS>, 1);
    return INVALID;
}

template <int DEPTH>
int launch(const Program& p, bool half, int blocks, int threads, cudaStream_t stream) {
    return half ? launch<Float16, DEPTH>(p, blocks, threads, stream) : launch<Bfloat16, DEPTH>(p, blocks, threads, stream);
}

}  // namespace

// Bytes of Matrix, Phase and Program, for the host's copies of them.
extern "C" void mimo_fast_engine_sizes(int* sizes) {
    sizes[0] = sizeof(Matrix), sizes[1] = sizeof(Phase), sizes[2] = sizeof(Program);
}

// Bytes of shared memory that a launch takes.
extern "C" int mimo_fast_engine_shared(const Program* program, int threads, int depth) {
    return Places(*program, threads, depth).total;
}

// Bytes that ATTEND takes of x's place, for rows of up to `capacity` positions.
extern "C" int mimo_fast_engine_scratch(int heads, int kv_heads, int head_dim, int capacity) {
    const int share = heads / kv_heads, each = (capacity + PARTS_OF_ROW - 1) / PARTS_OF_ROW;
    const int size = (each + LEAST_PART - 1) / LEAST_PART * LEAST_PART;
    return 4 * ((2 * share + 3) * head_dim + share * size + SPLIT_GROUPS * head_dim + 2 * share);
}

// Bytes that DRAW takes of it, of channels of up to `size` codes.
extern "C" int mimo_fast_engine_draw_scratch(int size) { return draw_scratch(size); }

// Bytes that ATTEND_RING takes of x's place.
extern "C" int mimo_fast_engine_ring(int stream_rows, int context) { return ring_bytes(stream_rows, context); }

// Bytes that ATTEND_FRAMES takes of x's place, for groups of so many rows.
extern "C" int mimo_fast_engine_frames(int rows, int context, int ahead) { return frames_bytes(rows, context, ahead); }

// Bytes that TEXT takes of it.
extern "C" int mimo_fast_engine_text_scratch(int rows, int blocks) { return text_scratch(rows, blocks); }

// Runs a program. `bytes` of what is exchanged, and all outputs, are filled with ones before: "not there yet", NaN,
// NOT_FINITE. half: T is float16, else bfloat16. depth: parts of 1 KB of weights that a warp has on their way, 4 or 8.
// Returns a cudaError_t.
extern "C" int mimo_fast_engine_run(const Program* program, int64_t bytes, int half, int blocks, int threads, int depth,
                                    void* const* outputs, const int64_t* output_bytes, int output_count,
                                    cudaStream_t stream) {
    const Program& p = *program;
    if (blocks < 1 || threads < 32 || threads > 512 || threads % 32 || p.rows < 1 ||
        p.rows > (p.stream_rows ? MOST_STREAM_ROWS : MOST_ROWS) || p.count < 1 || p.steps < 1 || p.steps > MOST_STEPS || p.x_columns % COLUMNS || p.together > MOST_TOGETHER)
        return INVALID;
    if (const int error = fill_ones(p.exchanged, bytes, stream)) return error;
    for (int i = 0; i < output_count; ++i)
        if (const int error = fill_ones(outputs[i], output_bytes[i], stream)) return error;
    switch (depth) {
        case 4: return launch<4>(p, half, blocks, threads, stream);
        case 8: return launch<8>(p, half, blocks, threads, stream);
        default: return INVALID;
    }
}
