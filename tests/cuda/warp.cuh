// csrc/cuda/warp.cuh on a CPU: a thread of the device is a thread of the host, warps meet at barriers.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(threads)
// Blocks of threads run one after the other.
#define __shared__ static

using cudaStream_t = void*;
using std::sqrt;

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct dim3 { int x = 1, y = 1; dim3(int x = 1, int y = 1) : x(x), y(y) {} };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

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
inline float rsqrtf(float value) { return 1 / std::sqrt(value); }

inline uint4 load_once(const uint4* from) { return *from; }

inline float from_bfloat16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t to_bfloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    return uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

inline float from_half(uint16_t bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return value;
}

inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t which) {
    const uint64_t both = uint64_t(high) << 32 | low;
    uint32_t got = 0;
    for (int i = 0; i < 4; ++i) got |= uint32_t(both >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
    return got;
}

inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    const auto product = [&](int shift) {
        return uint32_t(to_bfloat16(from_bfloat16(uint16_t(a >> shift)) * from_bfloat16(uint16_t(b >> shift)))) << shift;
    };
    return product(0) | product(16);
}

inline void let_the_next_begin() {}
inline void wait_for_the_last() {}

inline void multiply_add(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    Warp& warp = own_warp();
    const int lane = threadIdx.x % 32;
    const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
    std::memcpy(warp.words[lane], mine, sizeof mine);
    warp.all.arrive_and_wait();
    const auto half = [](uint32_t word, int k) { return from_bfloat16(uint16_t(word >> 16 * (k % 2))); };
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = d[i];
        for (int k = 0; k < 16; ++k)
            sum += double(half(warp.words[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k)) *
                   half(warp.words[column * 4 + k % 8 / 2][4 + k / 8], k);
        d[i] = float(sum);
    }
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
