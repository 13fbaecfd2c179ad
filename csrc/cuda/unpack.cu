// Rows of an int4 or int8 weight as bfloat16 or float16, for a library's product: that of a prompt, which arithmetic bounds.
//
// A thread makes 8 neighbouring values, 16 bytes, from one plane of 8 neighbouring words; 16 threads make a block of 128
// columns (mimo_fast/kernels/matmul/quantized_weight.py) and find its words in the L1 cache after the first has read them.

#include "quantized.cuh"

namespace {

constexpr int VALUES = 8;
constexpr int THREADS = 256;

struct Rows {
    const uint4* words;
    const uint16_t* scales;
    const uint16_t* zeros;
    uint4* out;
    int64_t first;
    int64_t count;
    int k, bits, grouped;
};

template <class T>
__device__ inline uint32_t pair_of(const Rows& r, uint32_t low, uint32_t high, int shift, float zero, float scale) {
    const uint32_t mask = (1 << r.bits) - 1;
    const auto value = [&](uint32_t word) {
        return uint32_t(narrow<T>((float(word >> shift & mask) - zero) * scale));
    };
    return value(low) | value(high) << 16;
}

template <class T>
__global__ void __launch_bounds__(THREADS) unpack(const Rows r) {
    pdl_launch_dependents();
    pdl_wait();
    const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    const int width = r.k / VALUES;
    if (i >= r.count * width) return;
    const int64_t row = r.first + i / width;
    const int octet = i % width, block = octet / (COLUMNS / VALUES), within = octet % (COLUMNS / VALUES);
    // A plane of a block is as many words wide as the block has words.
    const int octets = r.bits / 2, plane = within / octets;
    const int64_t place = row * (r.k / COLUMNS) + block, group = r.grouped ? place : row;
    const uint4* words = r.words + place * r.bits + within % octets * 2;
    const uint4 low = words[0], high = words[1];
    const float scale = widen<T>(r.scales[group]);
    const float zero = float(1 << (r.bits - 1)) + (r.zeros ? from_half(r.zeros[group]) : 0);
    const auto two = [&](uint32_t a, uint32_t b) { return pair_of<T>(r, a, b, plane * r.bits, zero, scale); };
    r.out[i] = uint4{two(low.x, low.y), two(low.z, low.w), two(high.x, high.y), two(high.z, high.w)};
}

}  // namespace

// Rows first ... first + count - 1 of a weight as `mimo_fast_quantized_mma` takes it -> out [count, k]. Returns a
// cudaError_t.
extern "C" int mimo_fast_unpack(const void* words, const void* scales, const void* zeros, void* out, int64_t first,
                                int64_t count, int k, int bits, int grouped, int half, cudaStream_t stream) {
    const Rows rows{static_cast<const uint4*>(words), as16(scales), as16(zeros), static_cast<uint4*>(out), first, count, k,
                    bits, grouped};
    const dim3 grid((count * (k / VALUES) + THREADS - 1) / THREADS);
    return half ? start<unpack<Float16>>(grid, THREADS, 0, stream, rows)
                : start<unpack<Bfloat16>>(grid, THREADS, 0, stream, rows);
}
