// csrc/cuda/warp.cuh on a CPU: a thread of the device is a thread of the host, warps meet at barriers. What is copied
// asynchronously arrives when it is waited for and no sooner; shared memory holds NaN before.
#pragma once

#include <barrier>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <values.cuh>

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
inline unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(block_of_threads->shared.data()); }

inline float shfl(float value, int from) {
    Warp& warp = own_warp();
    std::memcpy(&warp.words[threadIdx.x % 32][0], &value, 4);
    warp.all.arrive_and_wait();
    std::memcpy(&value, &warp.words[from][0], 4);
    warp.all.arrive_and_wait();
    return value;
}

inline float shfl_xor(float value, int lanes) { return shfl(value, threadIdx.x % 32 ^ lanes); }

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
    multiply_lane<T>(d, warp.words, lane);
    warp.all.arrive_and_wait();
}

struct Copy { uint4* to; const uint4* from; };
inline thread_local std::deque<std::vector<Copy>> groups(1);

inline uint64_t policy_evict_first() { return 0; }
inline uint64_t policy_evict_normal() { return 0; }
inline void prefetch_l2(const void*) {}
inline void cp_async(uint4* to, const uint4* from) { groups.back().push_back({to, from}); }
inline void cp_async(uint4* to, const uint4* from, uint64_t) { cp_async(to, from); }
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
