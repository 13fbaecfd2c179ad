// Threads of a device as fibers of one thread of a CPU. Which of those that can go on does is drawn, so that each seed is
// another order; one goes on until it waits for others. At times it is always the newest, so that one warp comes far ahead.
//
// What the device leaves open is made as bad as it may be: a copy to shared memory writes rubbish at once and the data only
// when it is waited for, and shared memory begins as NaNs.
#pragma once

#include <ucontext.h>

#include <map>
#include <memory>
#include <random>
#include <vector>

#include <values.cuh>

constexpr int STUCK = 719;
constexpr size_t STACK = 96 << 10;
constexpr uint32_t NANS = 0xffffffff;

inline uint32_t seed_of_fibers = 1;
extern "C" __attribute__((used)) inline void set_seed_of_fibers(uint32_t seed) { seed_of_fibers = seed; }

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
    const uint32_t* rows[32];
};

struct Block {
    dim3 index;
    Meeting all;
    std::vector<Warp> warps;
    std::vector<uint4> shared;
    std::map<int, Meeting> named;

    Block(dim3 index, int threads, int bytes)
        : index(index), all(threads), warps(threads / 32), shared((bytes + 15) / 16, uint4{NANS, NANS, NANS, NANS}) {}
};

inline dim3 threadIdx, blockIdx, gridDim, blockDim;

// Those of one launch.
struct Fibers {
    std::mt19937 draw{seed_of_fibers};
    std::vector<std::unique_ptr<Fiber>> all;
    std::vector<Fiber*> ready;
    ucontext_t scheduler;
    Fiber* running = nullptr;
    int alive = 0;
    bool newest = false;

    void add(Block& block, int threads, void (*body)()) {
        for (int i = 0; i < threads; ++i) {
            all.push_back(std::make_unique<Fiber>());
            Fiber& fiber = *all.back();
            fiber.block = &block, fiber.warp = &block.warps[i / 32], fiber.thread = i;
            begin(fiber, body);
            ready.push_back(&fiber);
            ++alive;
        }
    }

    static void begin(Fiber& fiber, void (*body)()) {
        fiber.stack.reset(new char[STACK]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, body, 0);
    }

    // One of those that can goes on until it waits or ends.
    void go_on() {
        if (draw() % 512 == 0) newest = !newest;
        const size_t which = newest ? ready.size() - 1 : draw() % ready.size();
        running = ready[which];
        ready[which] = ready.back();
        ready.pop_back();
        threadIdx = dim3(running->thread), blockIdx = running->block->index;
        swapcontext(&scheduler, &running->context);
    }
};

inline Fibers* fibers;

inline void to_scheduler() { swapcontext(&fibers->running->context, &fibers->scheduler); }

inline void end_of_fiber() {
    --fibers->alive;
    to_scheduler();
}

// All members come here; the last does `then`, and all go on.
template <class Then>
void meet(Meeting& meeting, Then then) {
    if (++meeting.arrived == meeting.members) {
        then();
        meeting.arrived = 0;
        fibers->ready.insert(fibers->ready.end(), meeting.waiting.begin(), meeting.waiting.end());
        meeting.waiting.clear();
    } else {
        meeting.waiting.push_back(fibers->running);
        to_scheduler();
    }
}

inline Block& own_block() { return *fibers->running->block; }
inline Warp& own_warp() { return *fibers->running->warp; }
inline int own_lane() { return fibers->running->thread % 32; }
inline void __syncthreads() { meet(own_block().all, [] {}); }
inline void sync_warp() { meet(own_warp().all, [] {}); }
template <int THREADS>
void barrier(int id) {
    meet(own_block().named.try_emplace(id, THREADS).first->second, [] {});
}
inline unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(own_block().shared.data()); }

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

inline void ldmatrix_x4(uint32_t (&d)[4], const uint4* row) {
    Warp& warp = own_warp();
    warp.rows[own_lane()] = &row->x;
    meet(warp.all, [] {});
    for (int i = 0; i < 4; ++i) d[i] = warp.rows[8 * i + own_lane() / 4][own_lane() % 4];
    meet(warp.all, [] {});
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

inline void copy(void* to, const void* from, int bytes) {
    std::memset(to, 0xff, bytes);
    fibers->running->copies.back().push_back({to, from, bytes});
}
inline void cp_async_commit_group() { fibers->running->copies.emplace_back(); }

template <int LEFT>
void cp_async_wait_group() {
    auto& copies = fibers->running->copies;
    while (int(copies.size()) - 1 > LEFT) {
        for (const Copy& each : copies.front()) std::memcpy(each.to, each.from, each.bytes);
        copies.erase(copies.begin());
    }
}
