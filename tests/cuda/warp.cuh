// csrc/cuda/warp.cuh on a CPU: a thread of the device is a thread of the host, warps meet at barriers.
#pragma once

#include <barrier>
#include <memory>
#include <thread>
#include <vector>

#include <values.cuh>

// Blocks of threads run one after the other.
#define __shared__ static

struct Warp {
    std::barrier<> all{32};
    uint32_t words[32][6];
};

struct Block {
    std::barrier<> all;
    std::vector<std::unique_ptr<Warp>> warps;
    explicit Block(int threads) : all(threads) {
        for (int i = 0; i < threads / 32; ++i) warps.push_back(std::make_unique<Warp>());
    }
};

inline thread_local dim3 threadIdx, blockIdx;
inline thread_local Block* block_of_threads;

inline Warp& own_warp() { return *block_of_threads->warps[threadIdx.x / 32]; }
inline void __syncthreads() { block_of_threads->all.arrive_and_wait(); }

inline uint4 load_once(const uint4* from) { return *from; }

inline void let_the_next_begin() {}
inline void wait_for_the_last() {}

inline void multiply_add(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    Warp& warp = own_warp();
    const int lane = threadIdx.x % 32;
    const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
    std::memcpy(warp.words[lane], mine, sizeof mine);
    warp.all.arrive_and_wait();
    multiply_lane(d, warp.words, lane);
    warp.all.arrive_and_wait();
}

template <class Argument>
void start(void (*kernel)(const Argument), dim3 grid, int threads, cudaStream_t, const Argument& argument) {
    for (int y = 0; y < grid.y; ++y)
        for (int x = 0; x < grid.x; ++x) {
            Block block(threads);
            std::vector<std::thread> running;
            for (int i = 0; i < threads; ++i)
                running.emplace_back([&, i] {
                    threadIdx = dim3(i), blockIdx = dim3(x, y), block_of_threads = &block;
                    kernel(argument);
                });
            for (auto& thread : running) thread.join();
        }
}

inline int last_error() { return 0; }
