// What the kernels ask of the machine, each under one name, that of its instruction where it is one. tests/kernels/cuda/warp.cuh
// has the same names for a CPU.
#pragma once

#include <atomic>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// The two types of activations, of 16 bits each; in the kernels' memory both are uint16_t.
struct Bfloat16 {};
struct Float16 {};

// ---- Bits

// Any function of three bits, 32 times: `TABLE` is f(0xf0, 0xcc, 0xaa). The compiler makes two instructions of
// (a & b) | c with two constants; this is one.
template <int TABLE>
__device__ inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
    return d;
}

// Bytes of {high, low}, which are numbered 7 ... 4 and 3 ... 0: hexadecimal digit i of `which` names byte i of the
// result, so that 0x5410 is {lower half of high, lower half of low} and 0x7632 the same of the upper halves.
__device__ inline uint32_t prmt(uint32_t low, uint32_t high, uint32_t which) { return __byte_perm(low, high, which); }

__device__ inline float shfl_xor(float value, int lanes) { return __shfl_xor_sync(0xffffffff, value, lanes); }

__device__ inline float shfl(float value, int lane) { return __shfl_sync(0xffffffff, value, lane); }

// ---- Numbers

// A sum and a product that no compiler joins to one instruction with one rounding; `fmaf` is the other.
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }

__device__ inline float mul(float a, float b) { return __fmul_rn(a, b); }

__device__ inline float from_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

template <class T>
__device__ inline float widen(uint16_t bits);
template <>
__device__ inline float widen<Bfloat16>(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
template <>
__device__ inline float widen<Float16>(uint16_t bits) { return from_half(bits); }

template <class T>
__device__ inline uint16_t narrow(float value);
template <>
__device__ inline uint16_t narrow<Bfloat16>(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
template <>
__device__ inline uint16_t narrow<Float16>(float value) { return __half_as_ushort(__float2half_rn(value)); }

// Two products at once, each rounded once.
template <class T>
__device__ inline uint32_t mul_pairs(uint32_t a, uint32_t b);
template <>
__device__ inline uint32_t mul_pairs<Bfloat16>(uint32_t a, uint32_t b) {
    const __nv_bfloat162 d = __hmul2(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(d);
}
template <>
__device__ inline uint32_t mul_pairs<Float16>(uint32_t a, uint32_t b) {
    const __half2 d = __hmul2(reinterpret_cast<__half2&>(a), reinterpret_cast<__half2&>(b));
    return reinterpret_cast<const uint32_t&>(d);
}

// Two sums at once, each rounded once; of bfloat16 as a times one plus b, for sm_80 has no sum of those.
template <class T>
__device__ inline uint32_t add_pairs(uint32_t a, uint32_t b);
template <>
__device__ inline uint32_t add_pairs<Bfloat16>(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80), "r"(b));
    return d;
}
template <>
__device__ inline uint32_t add_pairs<Float16>(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// a times b plus c of two at once, each rounded once.
template <class T>
__device__ inline uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c);
template <>
__device__ inline uint32_t fma_pairs<Bfloat16>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
template <>
__device__ inline uint32_t fma_pairs<Float16>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// D = A B + D in float32: A [16, 16], B [16, 8], D [16, 8]. Lane 4 g + t holds of A rows g (a0, a2) and g + 8 (a1, a3),
// columns 2 t, 2 t + 1 (a0, a1) and 8 more (a2, a3); of B column g and these rows; of D rows g and g + 8, columns 2 t and
// 2 t + 1.
template <class T>
__device__ inline void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1);
#define MMA_M16N8K16(TYPE, NAME)                                                                                    \
    template <>                                                                                                     \
    __device__ inline void mma_m16n8k16<TYPE>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,     \
                                              uint32_t b0, uint32_t b1) {                                           \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 "                                          \
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                       \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                        \
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                                \
    }
MMA_M16N8K16(Bfloat16, "bf16")
MMA_M16N8K16(Float16, "f16")
#undef MMA_M16N8K16

// ---- Memory

// The shared memory that a launch asks for.
__device__ inline unsigned char* dynamic_shared() {
    extern __shared__ uint4 dynamic_shared_memory[];
    return reinterpret_cast<unsigned char*>(dynamic_shared_memory);
}

// Four matrices of 8 rows of 16 bytes: lane l names row l % 8 of matrix l / 8 and gets of each matrix word l % 4 of row
// l / 4. As B of `mma_m16n8k16`, a matrix is 8 columns of 8 values.
__device__ inline void ldmatrix_x4(uint32_t (&d)[4], const uint4* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))
                 : "memory");
}

// Until THREADS threads have come to barrier `id`, of 1 ... 15; `__syncthreads` has 0.
template <int THREADS>
__device__ inline void barrier(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}

__device__ inline void sync_warp() { __syncwarp(); }

// How L2 is to treat a line: `evict_first` is for what is read once a launch, so that it takes no room from activations.
__device__ inline uint64_t policy_evict_first() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ inline uint64_t policy_evict_normal() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// 16 bytes from global to shared memory past L1, while the thread goes on. With 256B, a miss in L2 brings the whole 256
// bytes around them from memory into L2: neighbours ask for the rest. No policy is evict_normal.
// ptxas 13.0 may drop that policy, and has written instructions for such copies whose descriptor no GPU accepts; what is
// compiled is searched for them (tests/kernels/test_compile_matrix.py).
__device__ inline void cp_async(uint4* to, const uint4* from) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;"
                 :
                 : "r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from)
                 : "memory");
}

__device__ inline void cp_async(uint4* to, const uint4* from, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %2;"
                 :
                 : "r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from), "l"(policy)
                 : "memory");
}

// What the thread has asked for since its last commit becomes one group.
__device__ inline void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all of the thread's groups but the latest PENDING are there, for this thread to read.
template <int PENDING>
__device__ inline void cp_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// A line of L2 is asked for, for a later load.
__device__ inline void prefetch_l2(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// ---- Launches

// Programmatic dependent launch: a kernel may be set up, and begin, while the one before it ends. What that one writes,
// and what it still reads, may be touched after `pdl_wait` only. GPUs before sm_90 begin when all before has ended.
#ifdef __CUDA_ARCH__
constexpr int ARCHITECTURE = __CUDA_ARCH__;
#else
constexpr int ARCHITECTURE = 900;
#endif

__device__ inline void pdl_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

namespace {

constexpr int DEVICES = 64;

// What launches depend on: multiprocessors, bytes of shared memory a block may have, whether kernels begin early.
struct Device {
    int number = -1, multiprocessors = 1, shared = 0;
    bool early = false;
};

// The current device's, asked for once; nothing (number -1) where there is none.
const Device& current_device() {
    static Device known[DEVICES];
    static std::atomic<bool> asked[DEVICES];
    static const Device none;
    int number = 0, major = 0;
    if (cudaGetDevice(&number) != cudaSuccess || number >= DEVICES) return none;
    if (!asked[number].load(std::memory_order_acquire)) {
        Device found;
        found.number = number;
        cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, number);
        cudaDeviceGetAttribute(&found.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, number);
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, number);
        found.early = major >= 9;
        // Two threads at once write the same values.
        known[number] = found;
        asked[number].store(true, std::memory_order_release);
    }
    return known[number];
}

// Launches a kernel of one argument that calls `pdl_wait`. Returns a cudaError_t.
template <auto KERNEL, class Argument>
int start(dim3 grid, int threads, int shared, cudaStream_t stream, const Argument& argument) {
    const Device& device = current_device();
    static std::atomic<uint64_t> prepared;
    const uint64_t bit = uint64_t(1) << (device.number & 63);
    if (device.number >= 0 && !(prepared.load(std::memory_order_relaxed) & bit)) {
        // One division of the memory between L1 and shared memory for all kernels: changing it drains a multiprocessor.
        cudaFuncSetAttribute(KERNEL, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
        const cudaError_t error =
            cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared);
        // Cleared, for the caller's next call must not find it.
        if (error != cudaSuccess) return cudaGetLastError(), error;
        prepared.fetch_or(bit, std::memory_order_relaxed);
    }
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = device.early;
    const cudaError_t error = cudaLaunchKernelEx(&config, KERNEL, argument);
    return error == cudaSuccess ? error : (cudaGetLastError(), error);
}

}  // namespace
