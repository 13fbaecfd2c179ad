// The kernels of one instruction set, as a table. Every file of kernels is compiled once a set, into a namespace of its
// own (MIMO_FAST_SET); instruction_set.cpp chooses a table when the module is loaded.
#pragma once

#include "parameters.h"

namespace mimo_fast {

struct Kernels {
    const char* name;
    void (*quantized_matmul)(const QuantizedMatmul& p);
    // Products of integers on registers alone: how many `rounds` are, or 0 for none.
    int64_t (*multiply_registers)(int64_t rounds);
    void (*decode_attention)(const DecodeAttention& p);
    // y [M, rows] = x [M, columns] W^T + bias.
    void (*multiply)(const Linear& w, const float* x, int64_t M, float* y);
    // x [rows, dim] -> normed hidden states y [rows, dim], which may be x; appends to the cache. Rows of one
    // slot see one another as causal attention does.
    void (*step)(const Transformer& t, const float* x, float* y, const Cache& cache, const Positions& at);
    // x [N, T, dim] -> normed hidden states y: each sequence attends to itself from position 0 on.
    void (*encode)(const Transformer& t, const float* x, float* y, int64_t sequences, int64_t length, bool causal);
    // local [rows, dim], the first input -> codes [rows, channels, group_size].
    void (*decode_patch)(const PatchDecoder& p, const float* local, int64_t* codes, const SamplerRows& settings);
    // x [T, dim], replaced by what the last layer gives.
    void (*run_codec_stack)(const CodecStack& stack, float* x, int64_t T, const CodecAttention& attention);
    // x, rows of whole sequences, replaced by what the last layer gives, plus what layer `skip` gives.
    void (*run_codec_sequences)(const CodecStack& stack, float* x, const CodecSequences& sequences, int64_t skip);
    // The next chunk of several streams.
    void (*decode_chunks)(const CodecDecoder& d, const CodecChunk* chunks, int64_t count);
    // One id a row.
    void (*sample)(const Logits& logits, const SamplerRows& settings, int64_t* ids);
    // Standard Gumbel noise of `count` ids from `first` on.
    void (*gumbel)(int64_t seed, int64_t draw, uint32_t slot, uint32_t first, int64_t count, float* noise);
};

#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#elif defined(__aarch64__)
namespace neon { extern const Kernels kernels; }
#endif
namespace portable { extern const Kernels kernels; }

}  // namespace mimo_fast
