// csrc/cuda/engine/grid.cuh on a CPU: the fibers of all blocks, in any order.
//
// What blocks exchange is made as bad as it may be, too: a store waits in a buffer of its block, where that block alone
// sees it, and arrives late and in any order, except those to one address and those that a fence keeps apart. A thread
// that reads again and again calls `look_again` between, for nothing arrives while it goes on. What only one block may
// touch within a launch is watched.
#pragma once

#include <list>
#include <utility>

#include <warp.cuh>
#include "owners.cuh"
#include "stores.cuh"

constexpr int DISOWNED = 720;

inline int refusal = 0;
inline int looks_in_vain = 4;
// The next launch is refused with this error; 0: it is not.
extern "C" __attribute__((used)) inline void set_refusal(int error) { refusal = error; }
// How often all that wait for what blocks exchange look again when nothing arrives any more, before a launch is STUCK.
extern "C" __attribute__((used)) inline void set_looks_in_vain(int looks) { looks_in_vain = looks; }

// What a thread has to do with the exchange: the number of its block's stores at its last fence; the lines that it read
// last, and how many since it last waited for one of them; how often it has waited; whether it does.
struct Exchanger {
    static constexpr uint32_t MOST = 16;
    uint64_t fenced = 0;
    uintptr_t lines[MOST];
    uint32_t reads = 0, waits = 0;
    bool waiting = false;
};

// One launch. A fiber that waits for what blocks exchange goes on when something arrives in a line that it read.
struct Grid : Fibers {
    // Of a fiber's wait of that number.
    struct Look {
        Fiber* fiber;
        uintptr_t line;
        uint32_t wait;
    };

    std::vector<Exchanger> exchangers;               // of fibers
    std::vector<std::vector<Look>> looks{1024};      // of lines, by their number's remainder
    std::vector<Stores> stores;                      // of blocks
    std::vector<int> storing;                        // blocks whose stores have not all arrived
    Owners owners;
    uint32_t lateness = 1, until_manner = 0;
    int in_vain = 0;

    Grid(int blocks, int threads, std::function<void()> body)
        : Fibers(blocks * threads, body), exchangers(blocks * threads), stores(blocks) {}

    Exchanger& exchanger(const Fiber& fiber) { return exchangers[&fiber - all.data()]; }
    int own_number() const { return running->block->index.y * gridDim.x + running->block->index.x; }

    template <class Value>
    void store(Value* to, const Value& value) {
        Stores& own = stores[own_number()];
        if (own.waiting.empty()) storing.push_back(own_number());
        own.add(to, &value, sizeof value, exchanger(*running).fenced);
        while (own.waiting.size() > Stores::MOST) arrive();
    }

    template <class Value>
    Value load(const Value* from) {
        Exchanger& own = exchanger(*running);
        own.lines[own.reads++ % Exchanger::MOST] = line_of(from);
        Value value = *from;
        stores[own_number()].forward(from, &value, sizeof value);
        return value;
    }

    void fence() { exchanger(*running).fenced = stores[own_number()].made; }

    void look_again() {
        Exchanger& own = exchanger(*running);
        own.waiting = true, ++own.waits;
        for (; own.reads; --own.reads) {
            if (own.reads > Exchanger::MOST) own.reads = Exchanger::MOST;
            const uintptr_t line = own.lines[own.reads - 1];
            looks[line % looks.size()].push_back({running, line, own.waits});
        }
        wait();
    }

    void arrive() {
        const size_t i = draw.below(storing.size());
        Stores& from = stores[storing[i]];
        const Store store = from.take(draw.below(from.waiting.size()));
        if (from.waiting.empty()) storing[i] = storing.back(), storing.pop_back();
        std::memcpy(store.to, store.value, store.bytes);
        in_vain = 0;
        std::erase_if(looks[line_of(store.to) % looks.size()], [&](const Look& look) {
            Exchanger& own = exchanger(*look.fiber);
            const bool over = !own.waiting || own.waits != look.wait;
            if (over || look.line != line_of(store.to)) return over;
            wake(*look.fiber);
            own.waiting = false;
            return true;
        });
    }

    void wake_all() {
        for (auto& some : looks) some.clear();
        for (const Fiber& fiber : all)
            if (std::exchange(exchanger(fiber).waiting, false)) wake(fiber);
    }

    uint32_t event() override {
        if (!storing.empty()) arrive();
        const uint32_t steps = 1 + draw.below(lateness);
        if (steps < until_manner) return until_manner -= steps, steps;
        until_manner = Fibers::event();
        constexpr uint32_t LATENESS[] = {8, 128, 2048};
        lateness = LATENESS[draw.below(3)];
        wake_all();
        return steps;
    }

    bool idle() override {
        if (!storing.empty()) return arrive(), true;
        if (!alive || in_vain == looks_in_vain) return false;
        ++in_vain;
        wake_all();
        return true;
    }
};

inline Grid* grid;

inline uint32_t greatest_of_warp(uint32_t value) {
    return of_warp(value, [](uint32_t a, uint32_t b) { return std::max(a, b); });
}

inline uint32_t add_of_warp(uint32_t value) {
    return of_warp(value, [](uint32_t a, uint32_t b) { return a + b; });
}

inline uint4 load_relaxed(const uint4* from) { return grid->load(from); }
inline uint2 load_relaxed(const uint2* from) { return grid->load(from); }
inline uint32_t load_relaxed(const uint32_t* from) { return grid->load(from); }
inline void store_relaxed(uint4* to, uint4 value) { grid->store(to, value); }
inline void store_relaxed(uint2* to, uint2 value) { grid->store(to, value); }
inline void store_relaxed(uint32_t* to, uint32_t value) { grid->store(to, value); }

template <class T>
void own_store(T* to, T value) {
    grid->owners.write(to, sizeof value, grid->own_number());
    *to = value;
}

template <class T>
T own_load(const T* from) {
    grid->owners.read(from, sizeof *from, grid->own_number());
    return *from;
}

template <class Value>
Value load_shared_data(const Value* from) { return *from; }

inline void fence() { grid->fence(); }
inline int64_t clocks_now() { return 0; }
inline void look_again(int) { grid->look_again(); }

inline uint64_t policy_evict_last() { return 0; }

inline void prefetch_l1(const void*) {}

// The last to come knows what all have brought; nobody brings more before all have read it.
inline bool any_of_block(bool mine) {
    Block& block = own_block();
    block.vote |= mine;
    if (int(block.all.waiting.size()) + 1 == block.all.members) block.voted = std::exchange(block.vote, false);
    __syncthreads();
    return block.voted;
}

inline void copy_4(void* to, const void* from) { copy<4>(to, from); }
inline void copy_16(void* to, const void* from, uint64_t) { copy<16>(to, from); }
inline void copy_8(void* to, const void* from, uint64_t) { copy<8>(to, from); }

inline float fast_exp(float value) { return std::exp(value); }
inline float fast_log(float value) { return std::log(value); }
inline float fast_divide(float value, float by) { return value / by; }

inline int fill_ones(void* to, size_t bytes, cudaStream_t) { return std::memset(to, 0xff, bytes), 0; }

template <class Argument>
int start_together(void (*kernel)(const Argument), dim3 blocks, int threads, int shared, cudaStream_t,
                   const Argument& argument) {
    if (refusal) return std::exchange(refusal, 0);
    gridDim = blocks, blockDim = dim3(threads);
    const int count = blocks.x * blocks.y;
    Grid own(count, threads, [&] { kernel(argument); });
    grid = &own;
    std::list<Block> all;
    for (int i = 0; i < count; ++i) own.add(all.emplace_back(dim3(i % blocks.x, i / blocks.x), threads, shared));
    const int error = own.run();
    if (own.owners.violated) return DISOWNED;
    for (const Block& block : all)
        if (block.wrote_beyond()) return STUCK;
    return error;
}
