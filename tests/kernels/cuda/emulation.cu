// Small kernels that show what the CPU build does (test_emulation.py).

#include <grid.cuh>

namespace {

constexpr int COUNT = 8;
constexpr int SHARED = 2048;

// `lines` and `pairs` hold ones at first.
struct Given {
    uint4* lines;
    uint2* pairs;
    uint32_t* plain;
    uint32_t* out;
};

__device__ inline bool has_come(const uint4& line) { return line.x != 0xffffffff; }
__device__ inline bool has_come(const uint2& pair) { return pair.x != 0xffffffff; }
__device__ inline uint2 pair_of(uint32_t value) { return make_uint2(value, ~value); }
__device__ inline uint4 line_with(uint32_t value) { return make_uint4(value, ~value, value, ~value); }

template <class Value>
__device__ inline Value wait_for(const Value* at) {
    Value value = load_relaxed(at);
    while (!has_come(value)) {
        look_again(0);
        value = load_relaxed(at);
    }
    return value;
}

// Block 0 stores, block 1 notes in which of its rounds each value has come.
template <bool FENCED>
__global__ void arrivals(const Given given) {
    if (threadIdx.x) return;
    if (blockIdx.x == 0) {
        for (int i = 0; i < COUNT; ++i) {
            if (FENCED) fence();
            store_relaxed(given.pairs + i, pair_of(i));
        }
        return;
    }
    bool seen[COUNT] = {};
    for (int round = 0, count = 0;; ++round) {
        // The last first: where it has come, so have those before its fence.
        for (int i = COUNT - 1; i >= 0; --i) {
            const uint2 pair = load_relaxed(given.pairs + i);
            if (!has_come(pair) || seen[i]) continue;
            given.out[i] = round, seen[i] = true, ++count;
        }
        if (count == COUNT) return;
        look_again(0);
    }
}

// Several stores to one address: those that block 1 sees.
__global__ void one_address(const Given given) {
    if (threadIdx.x) return;
    if (blockIdx.x == 0) {
        for (int i = 0; i < COUNT; ++i) store_relaxed(given.lines, line_with(i));
        return;
    }
    uint32_t count = 0, last = 0xffffffff;
    while (last != COUNT - 1) {
        const uint4 line = load_relaxed(given.lines);
        if (line.x == last)
            look_again(0);
        else
            given.out[count++] = last = line.x;
    }
}

// Block 0 stores at once, block 1 looks once.
__global__ void unpolled(const Given given) {
    if (threadIdx.x) return;
    if (blockIdx.x == 0)
        store_relaxed(given.lines, line_with(5));
    else
        given.out[0] = load_relaxed(given.lines).x;
}

// Thread 0 sees what it stored itself, the others after a barrier, all of it and of parts.
__global__ void own_stores(const Given given) {
    if (threadIdx.x == 0) {
        store_relaxed(given.lines, line_with(6));
        store_relaxed(given.lines, line_with(7));
        given.out[0] = load_relaxed(given.lines).x;
    }
    __syncthreads();
    given.out[1 + threadIdx.x] = load_relaxed(reinterpret_cast<const uint2*>(given.lines) + threadIdx.x % 2).y;
}

// Of data that one block may touch; what block 1 does follows what block 0 does.
enum { EACH_ITS_OWN, ALL_READ, READ_AFTER, WRITTEN_AFTER, WRITTEN_TWICE, NEIGHBOURS };
template <int HOW>
__global__ void ownership(const Given given) {
    if (threadIdx.x) return;
    uint16_t* const data = reinterpret_cast<uint16_t*>(given.plain);
    if (blockIdx.x == 0) {
        if (HOW == ALL_READ || HOW == WRITTEN_AFTER)
            given.out[0] = own_load(given.plain);
        else if (HOW == NEIGHBOURS)
            own_store(data, uint16_t(3));
        else
            own_store(given.plain, 3u);
        store_relaxed(given.pairs, pair_of(0));
    } else {
        wait_for(given.pairs);
        if (HOW == NEIGHBOURS)
            own_store(data + 1, uint16_t(4));
        else if (HOW == WRITTEN_AFTER || HOW == WRITTEN_TWICE)
            own_store(given.plain, 4u);
        else
            given.out[1] = own_load(given.plain + (HOW == EACH_ITS_OWN));
    }
}

// Nobody stores what all wait for.
__global__ void nothing_comes(const Given given) { wait_for(given.lines + blockIdx.x); }

// Patience that ends.
__global__ void bounded(const Given given) {
    for (int looks = 0; looks < 50; ++looks) {
        if (has_come(load_relaxed(given.lines))) return;
        look_again(0);
    }
    given.out[0] = 1;
}

// One lane of a warp, or one thread of a block, does not come.
__global__ void lane_missing(const Given) {
    if (threadIdx.x) sync_warp();
}
__global__ void thread_missing(const Given) {
    if (threadIdx.x < 63) __syncthreads();
}

__global__ void shared_at_first(const Given given) {
    given.out[threadIdx.x] = reinterpret_cast<const uint32_t*>(dynamic_shared())[threadIdx.x];
}
__global__ void beyond_shared(const Given) {
    if (threadIdx.x == 0) dynamic_shared()[SHARED] = 0;
}

// In which order threads come.
__global__ void order(const Given given) { given.out[given.plain[0]++] = threadIdx.x; }

// What a copy to shared memory has brought before and after it is waited for, with one more on its way.
__global__ void copies(const Given given) {
    uint4* const shared = reinterpret_cast<uint4*>(dynamic_shared()) + 2 * threadIdx.x;
    shared[0] = line_with(1);
    for (int i = 0; i < 2; ++i) {
        copy_16(shared + i, given.plain + 4 * i, policy_evict_first());
        cp_async_commit_group();
    }
    uint32_t* const out = given.out + 4 * threadIdx.x;
    out[0] = shared[0].x;
    cp_async_wait_group<1>();
    out[1] = shared[0].x, out[2] = shared[1].x;
    cp_async_wait_group<0>();
    out[3] = shared[1].x;
}

__global__ void shuffles(const Given given) {
    const float lane = threadIdx.x % 32;
    given.out[threadIdx.x] = uint32_t(shfl(lane, (threadIdx.x * 7 + 3) % 32) + 32 * shfl_xor(lane, 5));
    given.out[threadIdx.x] += 1024 * greatest_of_warp(threadIdx.x);
}

constexpr struct {
    const char* name;
    void (*kernel)(const Given);
} KERNELS[] = {{"arrivals", arrivals<false>},
               {"fenced arrivals", arrivals<true>},
               {"one address", one_address},
               {"unpolled", unpolled},
               {"own stores", own_stores},
               {"each its own", ownership<EACH_ITS_OWN>},
               {"all read", ownership<ALL_READ>},
               {"read after", ownership<READ_AFTER>},
               {"written after", ownership<WRITTEN_AFTER>},
               {"written twice", ownership<WRITTEN_TWICE>},
               {"neighbours", ownership<NEIGHBOURS>},
               {"nothing comes", nothing_comes},
               {"bounded", bounded},
               {"lane missing", lane_missing},
               {"thread missing", thread_missing},
               {"shared at first", shared_at_first},
               {"beyond shared", beyond_shared},
               {"order", order},
               {"copies", copies},
               {"shuffles", shuffles}};

// a [16, 16], b [8, 16] as rows of 16-bit values, d [16, 8].
struct Matrices {
    const uint32_t* a;
    const uint4* b;
    float* d;
};

template <class T>
__global__ void product(const Matrices m) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    uint32_t b[4];
    ldmatrix_x4(b, m.b + lane % 8 * 2 + lane / 8 % 2);
    float d[4];
    const auto place = [&](int i) { return m.d + (g + i / 2 * 8) * 8 + 2 * t + i % 2; };
    for (int i = 0; i < 4; ++i) d[i] = *place(i);
    const uint32_t* const a = m.a + g * 8 + t;
    mma_m16n8k16<T>(d, a[0], a[64], a[4], a[68], b[0], b[1]);
    for (int i = 0; i < 4; ++i) *place(i) = d[i];
}

template <int... TABLES>
uint32_t wrong_tables(std::integer_sequence<int, TABLES...>) {
    return ((lop3<TABLES>(0xf0, 0xcc, 0xaa) % 256 != TABLES) + ...);
}

}  // namespace

// plain [16], out [256]. Returns a cudaError_t; -1 for an unknown name.
extern "C" int run(const char* name, int blocks, int threads, uint32_t* plain, uint32_t* out) {
    alignas(16) uint4 lines[COUNT];
    alignas(16) uint2 pairs[COUNT];
    for (const auto& [known, kernel] : KERNELS) {
        if (std::strcmp(known, name)) continue;
        const Given given{lines, pairs, plain, out};
        if (const int error = fill_ones(lines, sizeof lines, nullptr)) return error;
        if (const int error = fill_ones(pairs, sizeof pairs, nullptr)) return error;
        return start_together(kernel, blocks, threads, SHARED, nullptr, given);
    }
    return -1;
}

extern "C" int multiply_matrices(const void* a, const void* b, float* d, int half) {
    const Matrices matrices{static_cast<const uint32_t*>(a), static_cast<const uint4*>(b), d};
    return start_together(half ? product<Float16> : product<Bfloat16>, 1, 32, 0, nullptr, matrices);
}

extern "C" void widen_halves(const uint16_t* from, float* to, int count) {
    for (int i = 0; i < count; ++i) to[i] = from_half(from[i]);
}

extern "C" void narrow_floats(const float* from, uint16_t* to, int count) {
    for (int i = 0; i < count; ++i) to[i] = narrow<Float16>(from[i]);
}

extern "C" uint32_t wrong_tables() { return wrong_tables(std::make_integer_sequence<int, 256>()); }
