// Times products of many rows beside the rate of the instructions that they consist of; cpu_prompts.py builds and runs
// it, and says what is measured. Arguments: set, bits, M, N, K, SwiGLU, threads, tries. Prints a line of JSON.

#include <omp.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "instruction_set.h"

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

constexpr uint64_t ROUNDS = 40000;

#define EIGHT(one) one(0) one(1) one(2) one(3) one(4) one(5) one(6) one(7)
#define BYTES_512(i) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #i "\n"
#define WORDS_256(i) "vpmaddwd %%ymm14, %%ymm15, %%ymm1" #i "\nvpaddd %%ymm1" #i ", %%ymm" #i ", %%ymm" #i "\n"

// Values of x times values of W a second, on registers alone: a value of x of 16 bits takes two products of bytes.
double peak(bool wide) {
    uint64_t rounds = ROUNDS;
    const double start = now();
    if (wide) asm volatile("1:\n" EIGHT(BYTES_512) "dec %0\njnz 1b" : "+r"(rounds));
    else asm volatile("1:\n" WORDS_256(2) WORDS_256(3) WORDS_256(2) WORDS_256(3) WORDS_256(2) WORDS_256(3) WORDS_256(2)
                          WORDS_256(3) "dec %0\njnz 1b" : "+r"(rounds));
    return double(ROUNDS) * 8 * (wide ? 32 : 16) / (now() - start);
}

double peak_of_all(bool wide) {
    double total = 0;
#pragma omp parallel reduction(+ : total)
    total += peak(wide);
    return total;
}

}  // namespace

int main(int, char** arguments) {
    const std::string set = arguments[1];
    setenv("MIMO_FAST_CPU", set.c_str(), 1);
    const mimo_fast::Kernels& kernels = mimo_fast::choose_kernels();
    const int bits = std::atoi(arguments[2]), tries = std::atoi(arguments[8]);
    const int64_t M = std::atoi(arguments[3]), N = std::atoi(arguments[4]), K = std::atoi(arguments[5]), group = 128;
    const bool swiglu = std::atoi(arguments[6]);
    omp_set_num_threads(std::atoi(arguments[7]));
    std::mt19937 generator(1);
    std::vector<uint32_t> words(N * K * bits / 32);
    for (auto& word : words) word = uint32_t(generator());
    std::vector<uint16_t> scales(N * (K / group));
    for (auto& scale : scales) scale = uint16_t(0x3C00 + generator() % 256);
    std::vector<float> x(M * K), y(M * N);
    std::normal_distribution<float> normal;
    for (auto& value : x) value = normal(generator);
    mimo_fast::QuantizedMatmul p;
    p.weight.words = reinterpret_cast<const uint8_t*>(words.data());
    p.weight.scales = scales.data();
    p.weight.bits = bits;
    p.weight.block = 128;
    p.weight.group = group;
    p.weight.rows = N;
    p.weight.columns = K;
    p.swiglu = swiglu;
    p.x = x.data();
    p.y = y.data();
    p.M = M;
    double rate = 0, best = 0;
    for (int i = 0; i < tries; ++i) {
        for (int j = 0; j < 4; ++j) best = std::max(best, peak_of_all(set == "avx512"));
        const double start = now();
        kernels.quantized_matmul(p);
        rate = std::max(rate, double(M) * double(N) * double(K) / (now() - start));
        for (int j = 0; j < 4; ++j) best = std::max(best, peak_of_all(set == "avx512"));
    }
    uint64_t bits_of_y = 0xCBF29CE484222325u;
    for (int64_t i = 0; i < M * (swiglu ? N / 2 : N); ++i) {
        uint32_t value;
        std::memcpy(&value, &y[i], 4);
        bits_of_y = (bits_of_y ^ value) * 0x100000001B3u;
    }
    std::printf("{\"set\": \"%s\", \"bits\": %d, \"M\": %ld, \"N\": %ld, \"K\": %ld, \"swiglu\": %s, \"threads\": %s, "
                "\"rate\": %.4g, \"peak\": %.4g, \"share\": %.3f, \"checksum\": \"%016lx\"}\n",
                set.c_str(), bits, M, N, K, swiglu ? "true" : "false", arguments[7], rate, best, rate / best, bits_of_y);
    return kernels.name == set ? 0 : 1;
}
