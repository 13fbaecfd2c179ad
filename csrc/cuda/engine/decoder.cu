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

#include "attention.cuh"
#include "engine.cuh"
#include "exchange.cuh"
#include "logits.cuh"
#include "weights.cuh"

namespace {

template <int BITS, int DEPTH, bool USUAL>
__global__ void __launch_bounds__(512) decode(const Decoder p) {
    unsigned char* const shared = dynamic_shared();
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
