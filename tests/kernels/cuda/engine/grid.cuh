// csrc/cuda/engine/grid.cuh on a CPU: the fibers of all blocks, in any order.
//
// What blocks exchange is made as bad as it may be, too: stores arrive late and in any order, except those to one address.
// A launch in which no fiber can go on returns STUCK.
#pragma once

#include <algorithm>
#include <list>

#include <fibers.cuh>

struct Store {
    uint4* to;
    uint4 value;
};

// One launch.
struct Grid : Fibers {
    std::vector<Fiber*> looking;
    std::vector<Store> stores;
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

inline uint32_t greatest_of_warp(uint32_t value) {
    Warp& warp = own_warp();
    warp.words[own_lane()][0] = value;
    meet(warp.all, [&] {
        warp.greatest = 0;
        for (int i = 0; i < 32; ++i) warp.greatest = std::max(warp.greatest, warp.words[i][0]);
    });
    return warp.greatest;
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

inline void copy_16(void* to, const void* from, uint64_t) { copy(to, from, 16); }
inline void copy_8(void* to, const void* from, uint64_t) { copy(to, from, 8); }

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
    static const Argument* argument_of_body;
    static void (*kernel_of_body)(const Argument);
    argument_of_body = &argument, kernel_of_body = kernel;
    gridDim = dim3(blocks), blockDim = dim3(threads);
    Grid own;
    fibers = grid = &own;
    std::list<Block> all;
    for (int i = 0; i < blocks; ++i)
        own.add(all.emplace_back(dim3(i), threads, shared), threads, [] {
            kernel_of_body(*argument_of_body);
            end_of_fiber();
        });
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
        own.go_on();
    }
    while (!own.stores.empty()) own.deliver(0);
    return 0;
}
