// csrc/cuda/warp.cuh on a CPU, with threads that are fibers.
#pragma once

#include <fibers.cuh>

inline uint64_t policy_evict_first() { return 0; }
inline uint64_t policy_evict_normal() { return 0; }
inline void prefetch_l2(const void*) {}
inline void cp_async(uint4* to, const uint4* from) { copy<16>(to, from); }
inline void cp_async(uint4* to, const uint4* from, uint64_t) { copy<16>(to, from); }

constexpr int ARCHITECTURE = 900;
inline void pdl_launch_dependents() {}
inline void pdl_wait() {}

// Few multiprocessors, so that a block of threads has several tiles; and what a block may have of shared memory can be
// set from outside.
struct Device { int multiprocessors = 2, shared = 99 * 1024; };
inline Device& current_device() {
    static Device device;
    return device;
}
extern "C" inline void __attribute__((used)) mimo_fast_set_device(int multiprocessors, int shared) {
    current_device() = Device{multiprocessors, shared};
}

// One block of threads after the other. STUCK where threads wait in vain, or wrote beyond their shared memory.
template <class Argument>
int run_blocks(void (*kernel)(Argument), dim3 grid, int threads, int bytes, const std::remove_const_t<Argument>& argument) {
    gridDim = grid, blockDim = dim3(threads);
    Fibers own(threads, [&] { kernel(argument); });
    for (int y = 0; y < grid.y; ++y)
        for (int x = 0; x < grid.x; ++x) {
            Block block(dim3(x, y), threads, bytes);
            own.add(block);
            if (own.run() || block.wrote_beyond()) return STUCK;
        }
    return 0;
}

template <auto KERNEL, class Argument>
int start(dim3 grid, int threads, int bytes, cudaStream_t, const Argument& argument) {
    return run_blocks<Argument>(KERNEL, grid, threads, bytes, argument);
}
