// csrc/cuda/engine/grid.cuh on a CPU: every thread of every block is a fiber, and which of them goes on is drawn.
//
// What the device leaves open is made as bad as it may be: stores that blocks exchange arrive late and in any order
// (except those to one address), a copy to shared memory writes rubbish at once and the data only when it is waited for,
// shared memory begins as NaNs. A launch in which no fiber can go on returns STUCK.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include <values.cuh>

constexpr int STUCK = 719;
inline uint32_t seed_of_grid = 1;
constexpr size_t STACK = 96 << 10;

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

struct Warp;
struct Block;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Block* block;
    Warp* warp;
    int thread;
    std::vector<std::vector<Copy>> copies{1};
};

// Threads that wait for each other.
struct Meeting {
    explicit Meeting(int members) : members(members) {}
    int members, arrived = 0;
    std::vector<Fiber*> waiting;
};

struct Warp {
    Meeting all{32};
    uint32_t words[32][6];
    float lanes[32], sums[32][4];
    uint32_t greatest;
};

struct Block {
    int index;
    Meeting all;
    std::vector<Warp> warps;
    std::vector<uint4> shared;
};

struct Store {
    uint4* to;
    uint4 value;
};

// One launch.
struct Grid {
    Grid(int blocks, int threads) : blocks(blocks), threads(threads), draw(seed_of_grid), alive(blocks * threads) {}

    int blocks, threads;
    std::mt19937 draw;
    std::vector<Fiber*> ready, looking;
    std::vector<Store> stores;
    ucontext_t scheduler;
    Fiber* running = nullptr;
    int alive;
    bool news = true;

    void arrive(Store store) {
        *store.to = store.value;
        news = true;
    }
    void deliver(size_t which) {
        for (size_t i = 0; i < which; ++i)
            if (stores[i].to == stores[which].to) which = i;
        arrive(stores[which]);
        stores.erase(stores.begin() + which);
    }
    void wake() {
        ready.insert(ready.end(), looking.begin(), looking.end());
        looking.clear();
        news = false;
    }
};

inline Grid* grid;

struct Index { int x; };
#define threadIdx (Index{grid->running->thread})
#define blockIdx (Index{grid->running->block->index})
#define blockDim (Index{grid->threads})
#define gridDim (Index{grid->blocks})

inline void to_scheduler() { swapcontext(&grid->running->context, &grid->scheduler); }

// All members come here; the last does `then`, and all go on.
template <class Then>
void meet(Meeting& meeting, Then then) {
    if (++meeting.arrived == meeting.members) {
        then();
        meeting.arrived = 0;
        grid->ready.insert(grid->ready.end(), meeting.waiting.begin(), meeting.waiting.end());
        meeting.waiting.clear();
    } else {
        meeting.waiting.push_back(grid->running);
        to_scheduler();
    }
}

inline Warp& own_warp() { return *grid->running->warp; }
inline int own_lane() { return grid->running->thread % 32; }
inline void __syncthreads() { meet(grid->running->block->all, [] {}); }
inline unsigned char* dynamic_shared() {
    return reinterpret_cast<unsigned char*>(grid->running->block->shared.data());
}
inline void sync_warp() { meet(own_warp().all, [] {}); }

inline float shfl(float value, int lane) {
    Warp& warp = own_warp();
    std::memcpy(&warp.words[own_lane()][0], &value, 4);
    // All have read `lanes` when all have come to the next meeting.
    meet(warp.all, [&] {
        for (int i = 0; i < 32; ++i) std::memcpy(&warp.lanes[i], &warp.words[i][0], 4);
    });
    return warp.lanes[lane];
}

inline float shfl_xor(float value, int mask) { return shfl(value, own_lane() ^ mask); }

inline uint32_t greatest_of_warp(uint32_t value) {
    Warp& warp = own_warp();
    warp.words[own_lane()][0] = value;
    meet(warp.all, [&] {
        warp.greatest = 0;
        for (int i = 0; i < 32; ++i) warp.greatest = std::max(warp.greatest, warp.words[i][0]);
    });
    return warp.greatest;
}

template <class T>
void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    Warp& warp = own_warp();
    const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
    std::memcpy(warp.words[own_lane()], mine, sizeof mine);
    std::memcpy(warp.sums[own_lane()], d, sizeof d);
    meet(warp.all, [&] {
        for (int i = 0; i < 32; ++i) multiply_lane<T>(warp.sums[i], warp.words, i);
    });
    std::memcpy(d, warp.sums[own_lane()], sizeof d);
}

inline uint4 load_relaxed(const uint4* from) { return *from; }
inline uint32_t load_relaxed(const uint32_t* from) { return *from; }
inline void store_relaxed(uint32_t* to, uint32_t value) { *to = value; }
inline void store_relaxed(uint4* to, uint4 value) { grid->stores.push_back({to, value}); }

template <class Value>
Value load_shared_data(const Value* from) { return *from; }

inline void fence() {}
inline int64_t clocks_now() { return 0; }

inline void look_again(int) {
    grid->looking.push_back(grid->running);
    to_scheduler();
}

inline uint64_t policy_evict_last() { return 0; }
inline uint64_t policy_evict_first() { return 0; }
inline uint64_t policy_evict_normal() { return 0; }

inline void copy(void* to, const void* from, int bytes) {
    std::memset(to, 0xff, bytes);
    grid->running->copies.back().push_back({to, from, bytes});
}
inline void copy_16(void* to, const void* from, uint64_t) { copy(to, from, 16); }
inline void copy_8(void* to, const void* from, uint64_t) { copy(to, from, 8); }
inline void cp_async_commit_group() { grid->running->copies.emplace_back(); }

template <int LEFT>
void cp_async_wait_group() {
    auto& copies = grid->running->copies;
    while (int(copies.size()) - 1 > LEFT) {
        for (const Copy& each : copies.front()) std::memcpy(each.to, each.from, each.bytes);
        copies.erase(copies.begin());
    }
}

inline float fast_exp(float value) { return std::exp(value); }
inline float fast_divide(float value, float by) { return value / by; }

inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float bits_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <class Argument>
int start_together(void (*kernel)(const Argument), int blocks, int threads, int shared, cudaStream_t,
                   const Argument& argument) {
    Grid own(blocks, threads);
    grid = &own;
    std::vector<Block> all;
    std::vector<std::unique_ptr<Fiber>> fibers;
    for (int i = 0; i < blocks; ++i) {
        all.push_back({i, Meeting(threads), std::vector<Warp>(threads / 32), {}});
        const uint32_t nans = 0xffffffff;
        all.back().shared.assign((shared + 15) / 16, uint4{nans, nans, nans, nans});
    }
    static void (*body)();
    static const Argument* argument_of_body;
    static void (*kernel_of_body)(const Argument);
    argument_of_body = &argument, kernel_of_body = kernel;
    body = [] {
        kernel_of_body(*argument_of_body);
        --grid->alive;
        to_scheduler();
    };
    for (Block& block : all)
        for (int i = 0; i < threads; ++i) {
            auto fiber = std::make_unique<Fiber>();
            fiber->block = &block, fiber->warp = &block.warps[i / 32], fiber->thread = i;
            fiber->stack = std::make_unique<char[]>(STACK);
            getcontext(&fiber->context);
            fiber->context.uc_stack.ss_sp = fiber->stack.get();
            fiber->context.uc_stack.ss_size = STACK;
            makecontext(&fiber->context, body, 0);
            own.ready.push_back(fiber.get());
            fibers.push_back(std::move(fiber));
        }
    while (own.alive) {
        if (!own.stores.empty() && (own.ready.empty() || own.draw() % 8 == 0)) {
            own.deliver(own.draw() % own.stores.size());
            if (own.ready.empty()) own.wake();
        }
        if (own.ready.empty() || own.draw() % 256 == 0) {
            if (own.ready.empty() && !own.news && own.stores.empty()) return STUCK;
            own.wake();
        }
        if (own.ready.empty()) continue;
        const size_t which = own.draw() % own.ready.size();
        own.running = own.ready[which];
        own.ready[which] = own.ready.back();
        own.ready.pop_back();
        swapcontext(&own.scheduler, &own.running->context);
    }
    while (!own.stores.empty()) own.deliver(0);
    return 0;
}

extern "C" __attribute__((used)) inline void set_seed_of_grid(uint32_t seed) { seed_of_grid = seed; }
