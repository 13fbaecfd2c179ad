// What a persistent kernel asks of a grid whose blocks all run at once, each under one name, beside those of warp.cuh;
// tests/kernels/cuda/engine/grid.cuh has the same names for a CPU.
#pragma once

#include <warp.cuh>

// Of 16 bytes that blocks exchange: one indivisible access each, seen by the whole GPU, and no order with any other.
__device__ inline uint4 load_relaxed(const uint4* from) {
    uint64_t low, high;
    asm volatile("{ .reg .b128 v; ld.relaxed.gpu.global.b128 v, [%2]; mov.b128 {%0, %1}, v; }"
                 : "=l"(low), "=l"(high)
                 : "l"(from)
                 : "memory");
    return make_uint4(uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32));
}

__device__ inline void store_relaxed(uint4* to, uint4 value) {
    const uint64_t low = uint64_t(value.y) << 32 | value.x, high = uint64_t(value.w) << 32 | value.z;
    asm volatile("{ .reg .b128 v; mov.b128 v, {%1, %2}; st.relaxed.gpu.global.b128 [%0], v; }" ::"l"(to), "l"(low),
                 "l"(high)
                 : "memory");
}

// Of 8 bytes, as one value: two of 32 bits would be two accesses.
__device__ inline uint2 load_relaxed(const uint2* from) {
    uint64_t both;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(both) : "l"(from) : "memory");
    return make_uint2(uint32_t(both), uint32_t(both >> 32));
}

__device__ inline void store_relaxed(uint2* to, uint2 value) {
    const uint64_t both = uint64_t(value.y) << 32 | value.x;
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(both) : "memory");
}

__device__ inline uint32_t load_relaxed(const uint32_t* from) {
    uint32_t got;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(got) : "l"(from) : "memory");
    return got;
}

__device__ inline void store_relaxed(uint32_t* to, uint32_t value) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

__device__ inline uint32_t load_acquire(const uint32_t* from) {
    uint32_t got;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(got) : "l"(from) : "memory");
    return got;
}

__device__ inline void add_release(uint32_t* to, uint32_t value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

// What other blocks wrote before a fence of theirs: from L2, since L1 may hold what was there before.
template <class Value>
__device__ inline Value load_shared_data(const Value* from) { return __ldcg(from); }

// Global data that, within a launch, only one block writes and reads: a CPU watches that it is so.
template <class T>
__device__ inline void own_store(T* to, T value) { *to = value; }

template <class T>
__device__ inline T own_load(const T* from) { return *from; }

// Without the order of all fences that `__threadfence` keeps.
__device__ inline void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Between two looks at what has not come yet.
__device__ inline void look_again(int nanoseconds) {
    if (nanoseconds) __nanosleep(nanoseconds);
}

__device__ inline int64_t clocks_now() { return clock64(); }

// A barrier of the block; whether any of its threads brought true.
__device__ inline bool any_of_block(bool mine) { return __syncthreads_or(mine); }

// A line of L1 is asked for, for a later load.
__device__ inline void prefetch_l1(const void* from) { asm volatile("prefetch.global.L1 [%0];" ::"l"(from)); }

// Lines that leave L2 last.
__device__ inline uint64_t policy_evict_last() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Copies to shared memory, of a group as those of `cp_async`, that are visible to their own thread alone once it has
// waited for them.
__device__ inline void copy_16(void* shared, const void* global, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(
                     uint32_t(__cvta_generic_to_shared(shared))),
                 "l"(global), "l"(policy)
                 : "memory");
}

__device__ inline void copy_4(void* shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))), "l"(global)
                 : "memory");
}

__device__ inline void copy_8(void* shared, const void* global, uint64_t policy) {
    asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], 8, %2;" ::"r"(
                     uint32_t(__cvta_generic_to_shared(shared))),
                 "l"(global), "l"(policy)
                 : "memory");
}

__device__ inline uint32_t greatest_of_warp(uint32_t value) { return __reduce_max_sync(0xffffffffu, value); }

// The sum, modulo 2^32.
__device__ inline uint32_t add_of_warp(uint32_t value) { return __reduce_add_sync(0xffffffffu, value); }

// Within some units in the last place, without the cases of a division that IEEE 754 asks for.
__device__ inline float fast_exp(float value) { return __expf(value); }
__device__ inline float fast_log(float value) { return __logf(value); }
__device__ inline float fast_divide(float value, float by) { return __fdividef(value, by); }

__device__ inline uint32_t float_bits(float value) { return __float_as_uint(value); }
__device__ inline float bits_float(uint32_t bits) { return __uint_as_float(bits); }

// 0xff to each byte, in the stream's order. Returns a cudaError_t.
inline int fill_ones(void* to, size_t bytes, cudaStream_t stream) { return cudaMemsetAsync(to, 0xff, bytes, stream); }

// Launches a kernel of one argument whose blocks may wait for each other: refused if they do not all fit at once.
template <class Argument>
int start_together(void (*kernel)(Argument), dim3 blocks, int threads, int shared, cudaStream_t stream,
                   const Argument& argument) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error == cudaSuccess) {
        cudaLaunchAttribute together;
        together.id = cudaLaunchAttributeCooperative;
        together.val.cooperative = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = blocks;
        config.blockDim = threads;
        config.dynamicSmemBytes = shared;
        config.stream = stream;
        config.attrs = &together;
        config.numAttrs = 1;
        error = cudaLaunchKernelEx(&config, kernel, argument);
    }
    const cudaError_t last = cudaGetLastError();
    return error != cudaSuccess ? error : last;
}
