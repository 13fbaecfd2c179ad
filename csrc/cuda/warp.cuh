// What the kernels ask of a warp, each under one name: tests/cuda/warp.cuh has the same names for a CPU.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// 16 bytes that nobody reads again: they pass the L1 cache by and leave L2 first.
__device__ inline uint4 load_once(const uint4* from) {
    uint4 got;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(got.x), "=r"(got.y), "=r"(got.z), "=r"(got.w)
                 : "l"(from));
    return got;
}

// D = A B + D of bfloat16 in float32: A [16, 16], B [16, 8], D [16, 8]. Lane 4 g + t holds of A rows g and g + 8,
// columns 2 t, 2 t + 1 and 8 more; of B column g and these rows; of D rows g and g + 8, columns 2 t and 2 t + 1.
__device__ inline void multiply_add(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t which) {
    return __byte_perm(low, high, which);
}

// Two products of bfloat16 at once, each rounded once.
__device__ inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    const __nv_bfloat162 product = __hmul2(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(product);
}

__device__ inline float from_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

__device__ inline float from_bfloat16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

__device__ inline uint16_t to_bfloat16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

// A kernel may be set up, and begin, while the one before it ends: what that one writes, and what it still reads, may be
// touched after `wait_for_the_last` only. Older GPUs begin when all before has ended.
__device__ inline void let_the_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void wait_for_the_last() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

inline bool begins_early() {
    int device, major;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return major >= 9;
}

// Launches a kernel of one argument that calls `wait_for_the_last`.
template <class Argument>
void start(void (*kernel)(Argument), dim3 grid, int threads, cudaStream_t stream, const Argument& argument) {
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = threads;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = begins_early();
    cudaLaunchKernelEx(&config, kernel, argument);
}

inline int last_error() { return cudaGetLastError(); }
