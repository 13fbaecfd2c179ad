// csrc/cuda/warp.cuh on a CPU: a thread of the device is a thread of the host, warps meet at barriers. What is copied
// asynchronously arrives when it is waited for and no sooner; shared memory holds NaN before.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)

using cudaStream_t = void*;
using std::sqrt;

struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct dim3 { int x = 1, y = 1; dim3(int x = 1, int y = 1) : x(x), y(y) {} };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

struct Bfloat16 {};
struct Float16 {};

struct Warp {
    std::barrier<> all{32};
    uint32_t words[32][6];
};

struct Block {
    static constexpr uint32_t UNTOUCHED = 0x7fc07fc1;
    std::barrier<> all;
    std::vector<std::unique_ptr<Warp>> warps;
    std::vector<uint4> shared;
    std::map<int, std::unique_ptr<std::barrier<>>> named;
    std::mutex naming;

    // With a line of 16 bytes behind the shared memory that nobody may write.
    Block(int threads, int bytes) : all(threads), shared(bytes / 16 + 1, uint4{UNTOUCHED, UNTOUCHED, UNTOUCHED, UNTOUCHED}) {
        for (int i = 0; i < threads / 32; ++i) warps.push_back(std::make_unique<Warp>());
    }
    ~Block() {
        if (shared.back().x != UNTOUCHED || shared.back().w != UNTOUCHED) std::abort();
    }
};

inline thread_local dim3 threadIdx, blockIdx, gridDim;
inline thread_local Block* block_of_threads;

inline Warp& own_warp() { return *block_of_threads->warps[threadIdx.x / 32]; }
inline void __syncthreads() { block_of_threads->all.arrive_and_wait(); }
inline void sync_warp() { own_warp().all.arrive_and_wait(); }
template <int THREADS>
void barrier(int id) {
    std::barrier<>* found;
    {
        const std::lock_guard<std::mutex> lock(block_of_threads->naming);
        auto& place = block_of_threads->named[id];
        if (!place) place = std::make_unique<std::barrier<>>(THREADS);
        found = place.get();
    }
    found->arrive_and_wait();
}
inline float rsqrtf(float value) { return 1 / std::sqrt(value); }
inline unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(block_of_threads->shared.data()); }

template <int TABLE>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d = 0;
    for (int i = 0; i < 8; ++i)
        if (TABLE >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return d;
}

inline uint32_t prmt(uint32_t low, uint32_t high, uint32_t which) {
    const uint64_t both = uint64_t(high) << 32 | low;
    uint32_t got = 0;
    for (int i = 0; i < 4; ++i) got |= uint32_t(both >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
    return got;
}

inline float shfl_xor(float value, int lanes) {
    Warp& warp = own_warp();
    const int lane = threadIdx.x % 32;
    std::memcpy(&warp.words[lane][0], &value, 4);
    warp.all.arrive_and_wait();
    std::memcpy(&value, &warp.words[lane ^ lanes][0], 4);
    warp.all.arrive_and_wait();
    return value;
}

inline float shfl(float value, int from) {
    Warp& warp = own_warp();
    std::memcpy(&warp.words[threadIdx.x % 32][0], &value, 4);
    warp.all.arrive_and_wait();
    std::memcpy(&value, &warp.words[from][0], 4);
    warp.all.arrive_and_wait();
    return value;
}

inline float from_half(uint16_t bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return value;
}

template <class T>
float widen(uint16_t bits);
template <>
inline float widen<Bfloat16>(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}
template <>
inline float widen<Float16>(uint16_t bits) { return from_half(bits); }

template <class T>
uint16_t narrow(float value);
template <>
inline uint16_t narrow<Bfloat16>(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    return uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}
template <>
inline uint16_t narrow<Float16>(float value) {
    const _Float16 half = _Float16(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

template <class T, class Operation>
uint32_t of_pairs(uint32_t a, uint32_t b, Operation operation) {
    const auto one = [&](int shift) {
        return uint32_t(narrow<T>(operation(widen<T>(uint16_t(a >> shift)), widen<T>(uint16_t(b >> shift))))) << shift;
    };
    return one(0) | one(16);
}
template <class T>
uint32_t mul_pairs(uint32_t a, uint32_t b) { return of_pairs<T>(a, b, [](float x, float y) { return x * y; }); }
template <class T>
uint32_t add_pairs(uint32_t a, uint32_t b) { return of_pairs<T>(a, b, [](float x, float y) { return x + y; }); }

template <class T>
uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c) {
    const auto one = [&](int shift) {
        const auto wide = [&](uint32_t pair) { return double(widen<T>(uint16_t(pair >> shift))); };
        return uint32_t(narrow<T>(float(wide(a) * wide(b) + wide(c)))) << shift;
    };
    return one(0) | one(16);
}

inline void ldmatrix_x4(uint32_t (&d)[4], const uint4* row) {
    Warp& warp = own_warp();
    const int lane = threadIdx.x % 32;
    std::memcpy(warp.words[lane], &row, sizeof row);
    warp.all.arrive_and_wait();
    for (int i = 0; i < 4; ++i) {
        const uint32_t* from;
        std::memcpy(&from, warp.words[8 * i + lane / 4], sizeof from);
        d[i] = from[lane % 4];
    }
    warp.all.arrive_and_wait();
}

template <class T>
void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    Warp& warp = own_warp();
    const int lane = threadIdx.x % 32;
    const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
    std::memcpy(warp.words[lane], mine, sizeof mine);
    warp.all.arrive_and_wait();
    const auto half = [](uint32_t word, int k) { return widen<T>(uint16_t(word >> 16 * (k % 2))); };
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

struct Copy { uint4* to; const uint4* from; };
inline thread_local std::deque<std::vector<Copy>> groups(1);

inline uint64_t policy_evict_first() { return 0; }
inline uint64_t policy_evict_normal() { return 0; }
inline void prefetch_l2(const void*) {}
inline void cp_async(uint4* to, const uint4* from, uint64_t) { groups.back().push_back({to, from}); }
inline void cp_async_commit_group() { groups.emplace_back(); }

template <int PENDING>
void cp_async_wait_group() {
    // The last one is not committed yet.
    for (; groups.size() > PENDING + 1; groups.pop_front())
        for (const Copy& copy : groups.front()) *copy.to = *copy.from;
}

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

template <class Argument>
void run_blocks(void (*kernel)(Argument), dim3 grid, int threads, int bytes, const std::remove_const_t<Argument>& argument) {
    for (int y = 0; y < grid.y; ++y)
        for (int x = 0; x < grid.x; ++x) {
            Block block(threads, bytes);
            std::vector<std::thread> running;
            for (int i = 0; i < threads; ++i)
                running.emplace_back([&, i] {
                    threadIdx = dim3(i), blockIdx = dim3(x, y), gridDim = grid, block_of_threads = &block;
                    kernel(argument);
                });
            for (auto& thread : running) thread.join();
        }
}

template <auto KERNEL, class Argument>
int start(dim3 grid, int threads, int bytes, cudaStream_t, const Argument& argument) {
    run_blocks<Argument>(KERNEL, grid, threads, bytes, argument);
    return 0;
}
