// What the design of a persistent engine rests on, measured alone: how long blocks take to exchange a vector, how fast they
// stream weights that L2 holds or does not hold, and both at once. benchmarks/studies/engine.py runs these.

#include <engine/grid.cuh>

namespace {

constexpr uint32_t PATIENCE = 1 << 20;

// Whether to go on looking: everybody leaves once somebody has lost patience.
__device__ inline bool patient(uint32_t* error, uint32_t looks) {
    if (looks % 1024) return true;
    if (looks >= PATIENCE) store_relaxed(error, 1);
    return load_relaxed(error) == 0;
}

// Phases as the engine has them: all of a vector is waited for, each warp takes `parts` parts of weights from a queue that
// goes on over the phases, and the block makes its share of the next vector. Vectors are of words of 8 bytes, which were
// ones before.
struct Phases {
    const uint4* weights;
    int64_t pieces;     // of 1 KB
    uint2* exchanged;   // [phases, words]
    uint32_t* error;    // 0 at first
    int words, phases, parts;
    int waits;          // 0: nobody waits
    uint32_t* result;   // [blocks, threads]: the sum of the words that were read, and of the weights' low words
};

template <int DEPTH>
__global__ void __launch_bounds__(512) run_phases(const Phases p) {
    const int warps = int(blockDim.x) / 32, warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    uint4* const fifo = reinterpret_cast<uint4*>(dynamic_shared()) + warp * DEPTH * 64 + lane;
    const int64_t all = int64_t(gridDim.x) * warps;
    int64_t next = int64_t(blockIdx.x) * warps + warp, left = int64_t(p.phases) * p.parts;
    const uint64_t policy = policy_evict_first();
    const auto ask = [&](int slot) {
        if (left > 0) {
            copy_16(fifo + slot * 64, p.weights + next * 64 + lane, policy);
            copy_16(fifo + slot * 64 + 32, p.weights + next * 64 + 32 + lane, policy);
            next += all, --left;
            if (next >= p.pieces) next %= all;
        }
        cp_async_commit_group();
    };
    for (int i = 0; i < DEPTH; ++i) ask(i);
    const int mine = int(int64_t(p.words) * blockIdx.x / gridDim.x);
    const int after = int(int64_t(p.words) * (blockIdx.x + 1) / gridDim.x);
    uint32_t sum = 0;
    int slot = 0;
    bool lost = false;
    for (int n = 0; n < p.phases; ++n) {
        if (n && p.waits) {
            const uint2* const from = p.exchanged + int64_t(n - 1) * p.words;
            for (int i = threadIdx.x; i < p.words && !lost; i += blockDim.x) {
                uint2 got = load_relaxed(from + i);
                for (uint32_t looks = 1; got.x == 0xffffffff; ++looks) {
                    look_again(0);
                    if (!patient(p.error, looks)) {
                        lost = true;
                        break;
                    }
                    got = load_relaxed(from + i);
                }
                sum += got.x ^ got.y;
            }
        }
        if (any_of_block(lost)) break;
        for (int part = 0; part < p.parts; ++part) {
            cp_async_wait_group<DEPTH - 1>();
            sum += fifo[slot * 64].x + fifo[slot * 64 + 32].x;
            ask(slot);
            slot = slot + 1 == DEPTH ? 0 : slot + 1;
        }
        // The products' sums would be there now.
        any_of_block(false);
        for (int i = mine + int(threadIdx.x); i < after; i += blockDim.x)
            store_relaxed(p.exchanged + int64_t(n) * p.words + i, make_uint2(uint32_t(n), uint32_t(i)));
    }
    cp_async_wait_group<0>();
    p.result[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

}  // namespace

// Phases in one launch, of 1 to 512 threads in whole warps. bytes: of the weights, at least 1 KB for each warp of the grid;
// depth: parts of 1 KB that a warp has on their way, 4, 6 or 8. exchanged: [phases, words] of 8 bytes; error: uint32, 0 at
// first. Returns a cudaError_t.
extern "C" int mimo_fast_engine_phases(const void* weights, int64_t bytes, void* exchanged, void* error, int words, int phases,
                                       int parts, int waits, int depth, int blocks, int threads, void* result,
                                       cudaStream_t at) {
    const int64_t warps = int64_t(blocks) * (threads / 32), pieces = bytes / 1024 / warps * warps;
    const Phases p{static_cast<const uint4*>(weights), pieces,
                   static_cast<uint2*>(exchanged),     static_cast<uint32_t*>(error),
                   words,                              phases,
                   parts,                              waits,
                   static_cast<uint32_t*>(result)};
    const size_t filled = size_t(words) * phases * sizeof(uint2);
    if (const int failed = fill_ones(exchanged, filled, at)) return failed;
    const int shared = threads / 32 * depth * 1024;
    switch (depth) {
        case 4: return start_together(run_phases<4>, blocks, threads, shared, at, p);
        case 6: return start_together(run_phases<6>, blocks, threads, shared, at, p);
        default: return start_together(run_phases<8>, blocks, threads, shared, at, p);
    }
}

// What the CPU build has no names for.
#ifdef __CUDACC__

#include <cooperative_groups.h>

namespace {

// An exchange: every block makes its part of a vector of `chunks` pieces of 16 bytes and reads `reads` of them, those
// from its own share on. The next one begins when all threads of the block have what they read.
enum Kind { TAGGED, COOPERATIVE, COUNTER, COOPERATIVE_ALONE, COUNTER_ALONE };

constexpr int RING = 8;

struct Exchange {
    uint4* buffers;    // [RING, chunks], zeros at first
    uint32_t* words;   // an error, then a counter 32 words on; zeros at first
    int chunks, reads, iterations;
    uint32_t* result;  // [blocks]
};

template <int KIND>
__global__ void exchange(const Exchange e) {
    __shared__ uint32_t stop;
    uint32_t* error = e.words;
    uint32_t* counter = e.words + 32;
    const int shares = e.chunks / e.reads, first = int(blockIdx.x) % shares * e.reads;
    const int mine = int(int64_t(e.chunks) * blockIdx.x / gridDim.x);
    const int after = int(int64_t(e.chunks) * (blockIdx.x + 1) / gridDim.x);
    constexpr bool data = KIND == TAGGED || KIND == COOPERATIVE || KIND == COUNTER;
    uint32_t sum = threadIdx.x;
    if (threadIdx.x == 0) stop = 0;
    __syncthreads();
    for (int n = 1; n <= e.iterations; ++n) {
        uint4* buffer = e.buffers + n % RING * e.chunks;
        if (data)
            for (int i = mine + threadIdx.x; i < after; i += blockDim.x)
                store_relaxed(buffer + i, make_uint4(sum, n, i, (sum & 0xffff) | uint32_t(n) << 16));
        bool left = false;
        if (KIND == COOPERATIVE || KIND == COOPERATIVE_ALONE) cooperative_groups::this_grid().sync();
        if (KIND == COUNTER || KIND == COUNTER_ALONE) {
            __syncthreads();
            if (threadIdx.x == 0) {
                add_release(counter, 1);
                for (uint32_t looks = 1; load_acquire(counter) < uint32_t(n) * gridDim.x; ++looks)
                    if (!patient(error, looks)) {
                        left = true;
                        break;
                    }
            }
            __syncthreads();
        }
        if (data)
            for (int i = first + threadIdx.x; i < first + e.reads; i += blockDim.x) {
                uint4 got = load_relaxed(buffer + i);
                for (uint32_t looks = 1; KIND == TAGGED && got.w >> 16 != (uint32_t(n) & 0xffff); ++looks) {
                    if (!patient(error, looks)) {
                        left = true;
                        break;
                    }
                    got = load_relaxed(buffer + i);
                }
                sum += got.z;
            }
        if (left) stop = 1;
        __syncthreads();
        // A grid barrier has no way out: its kinds cannot lose patience either.
        if (stop) break;
    }
    if (threadIdx.x == 0) e.result[blockIdx.x] = sum;
}

// Weights read again and again: the blocks take turns by pieces of 16 bytes a thread; DEPTH of them a thread are on
// their way. Bytes before `keep` are to stay in L2, those after it to leave first; with keep < 0 L2 is told nothing.
struct Stream {
    const uint4* weights;
    int64_t pieces;  // of 2048 bytes, 64 for each thread of a warp
    int64_t keep;
    int passes;
    uint32_t* result;
};

template <int DEPTH, bool HINTED>
__global__ void __launch_bounds__(512) stream(const Stream s) {
    unsigned char* const shared = dynamic_shared();
    uint4* fifo = reinterpret_cast<uint4*>(shared) + threadIdx.x;
    const int64_t warp = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    const int64_t warps = int64_t(gridDim.x) * (blockDim.x / 32);
    const uint64_t kept = policy_evict_last(), dropped = policy_evict_first();
    int64_t next = warp;
    int pass = 0;
    uint32_t sum = 0;
    const auto ask = [&](int slot) {
        if (pass < s.passes) {
            const uint4* from = s.weights + next * 128 + threadIdx.x % 32;
            const uint64_t policy = next < s.keep ? kept : dropped;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                uint4* to = fifo + (slot * 4 + i) * blockDim.x;
                if (HINTED)
                    copy_16(to, from + 32 * i, policy);
                else
                    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                                     uint32_t(__cvta_generic_to_shared(to))),
                                 "l"(from + 32 * i)
                                 : "memory");
            }
            next += warps;
            if (next >= s.pieces) next = warp, ++pass;
        }
        cp_async_commit_group();
    };
    for (int i = 0; i < DEPTH; ++i) ask(i);
    const int64_t each = (s.pieces - warp + warps - 1) / warps;
    int slot = 0;
    for (int64_t n = 0; n < each * s.passes; ++n) {
        cp_async_wait_group<DEPTH - 1>();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint4 got = fifo[(slot * 4 + i) * blockDim.x];
            sum += got.x ^ got.y ^ got.z ^ got.w;
        }
        ask(slot);
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }
    cp_async_wait_group<0>();
    s.result[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// The same bytes through registers: 8 loads of 16 bytes a thread at a time.
__global__ void __launch_bounds__(512) registers(const Stream s) {
    const int64_t warp = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    const int64_t warps = int64_t(gridDim.x) * (blockDim.x / 32);
    uint32_t sum = 0;
    for (int pass = 0; pass < s.passes; ++pass)
        for (int64_t next = warp; next < s.pieces; next += 2 * warps) {
            uint4 got[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int64_t piece = next + i / 4 * warps;
                got[i] = make_uint4(0, 0, 0, 0);
                if (piece < s.pieces)
                    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                                 : "=r"(got[i].x), "=r"(got[i].y), "=r"(got[i].z), "=r"(got[i].w)
                                 : "l"(s.weights + piece * 128 + i % 4 * 32 + threadIdx.x % 32));
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) sum += got[i].x ^ got[i].y ^ got[i].z ^ got[i].w;
        }
    s.result[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

}  // namespace

// One launch of `iterations` exchanges of a kind. chunks is a multiple of reads. Returns a cudaError_t.
extern "C" int mimo_fast_engine_exchange(int kind, int blocks, int threads, int chunks, int reads, int iterations,
                                         void* buffers, void* words, void* result, cudaStream_t at) {
    const Exchange e{static_cast<uint4*>(buffers), static_cast<uint32_t*>(words), chunks, reads, iterations,
                     static_cast<uint32_t*>(result)};
    switch (kind) {
        case TAGGED: return start_together(exchange<TAGGED>, blocks, threads, 0, at, e);
        case COOPERATIVE: return start_together(exchange<COOPERATIVE>, blocks, threads, 0, at, e);
        case COUNTER: return start_together(exchange<COUNTER>, blocks, threads, 0, at, e);
        case COOPERATIVE_ALONE: return start_together(exchange<COOPERATIVE_ALONE>, blocks, threads, 0, at, e);
        default: return start_together(exchange<COUNTER_ALONE>, blocks, threads, 0, at, e);
    }
}

// Reads `bytes` of weights `passes` times; the first `keep` of them are to stay in L2 (below 0: no hints). depth: pieces
// of 64 bytes a thread on their way, 1, 2, 4 or 6, or 0 for loads to registers. result: uint32 [blocks, threads].
extern "C" int mimo_fast_engine_stream(const void* weights, int64_t bytes, int64_t keep, int passes, int depth,
                                       int blocks, int threads, void* result, cudaStream_t at) {
    const Stream s{static_cast<const uint4*>(weights), bytes / 2048, keep / 2048, passes, static_cast<uint32_t*>(result)};
    const int shared = depth * 64 * threads;
    const bool hinted = keep >= 0;
    switch (depth) {
        case 0: return start_together(registers, blocks, threads, 0, at, s);
        case 1: return start_together(hinted ? stream<1, true> : stream<1, false>, blocks, threads, shared, at, s);
        case 2: return start_together(hinted ? stream<2, true> : stream<2, false>, blocks, threads, shared, at, s);
        case 4: return start_together(hinted ? stream<4, true> : stream<4, false>, blocks, threads, shared, at, s);
        default: return start_together(hinted ? stream<6, true> : stream<6, false>, blocks, threads, shared, at, s);
    }
}

#endif
