// What the kernels are asked to do, in plain data. Nothing here depends on an instruction set: bindings.cpp fills these
// structs, and every set of kernels reads them. Addresses are of the caller's memory, which must outlive the call.
#pragma once

#include <cstdint>
#include <vector>

namespace mimo_fast {

enum class Type : int { float32, bfloat16 };

// W [rows, columns] = scale (q - zero), packed as mimo_fast/kernels/matmul/quantized_weight.py says.
struct QuantizedWeight {
    const uint8_t* words = nullptr;    // [rows, columns bits / 8], in blocks of `block` columns
    const uint16_t* scales = nullptr;  // bfloat16 [rows, columns / group]
    const uint16_t* zeros = nullptr;   // float16 [rows, columns / group], or null for none
    int bits = 0;                      // 4 or 8
    int block = 0;                     // columns packed together: 64 or 128 of 4 bits, 32, 64 or 128 of 8
    int64_t group = 0;                 // columns that share a scale, a multiple of `block`
    int64_t rows = 0, columns = 0;
};

// y[M, F] = residual + f(normed x W^T + bias). f is the identity, and F = rows, or SwiGLU: W has the rows / 2 rows of
// gate, then those of up, and F = rows / 2.
struct QuantizedMatmul {
    QuantizedWeight weight;
    Type type = Type::float32;       // of x, y and the four vectors
    const void* bias = nullptr;      // [rows], or null for none
    const void* norm = nullptr;      // weight [columns] of an RMSNorm of x, or null for none
    float eps = 0;                   // of the norm
    bool swiglu = false;
    const void* x = nullptr;         // [M, columns]
    void* y = nullptr;               // [M, F]
    const void* residual = nullptr;  // [M, F], or null for none
    int64_t M = 0;
};

// Rows of a float32 matrix as they lie in memory.
struct DenseBlock {
    const float* weight;  // [rows, columns]; columns a multiple of 8
    const float* bias;    // [rows], or null for none
    int64_t rows;
};

// What an adapter adds to rows first ... first + rows - 1 of a product: B (A x).
struct LowRank {
    const float* a;  // [rank, columns]; rank a multiple of 8
    const float* b;  // [rows, rank]
    int64_t rank, first, rows;
};

// A matrix [rows, columns] with its bias: dense blocks of rows one below the other, or quantized where there are none. With
// an adapter y = (x W^T + bias + B (A x)) factor + last_bias, as mimo_fast/kernels/matmul/adapted.py says.
struct Linear {
    std::vector<DenseBlock> blocks;
    QuantizedWeight quantized;
    const float* quantized_bias = nullptr;
    int64_t rows = 0, columns = 0;
    std::vector<LowRank> added;
    const float* factor = nullptr;     // [rows], or null for 1
    const float* last_bias = nullptr;  // [rows], or null for none

    // Multiplications of a row.
    int64_t size() const {
        int64_t total = rows * columns;
        for (const LowRank& part : added) total += part.rank * (columns + part.rows);
        return total;
    }
    // Whether its product is one of `quantized_matmul` and nothing else, which then has norm and residual inside.
    bool only_quantized() const { return blocks.empty() && added.empty(); }
};

// Keys and values [layers, slots, kv_heads, capacity, head_dim]. Strides are in elements; both share them.
struct Cache {
    void* k = nullptr;
    void* v = nullptr;
    int64_t layers = 0, slots = 0, capacity = 0;
    int64_t layer_stride = 0, slot_stride = 0, head_stride = 0, position_stride = 0;
};

// Row r appends to position starts[r] of slot slots[r] of a cache, and attends to that slot up to there, once all rows
// have appended. A row whose position does not exist writes nothing to the cache.
struct Positions {
    const int64_t* slots = nullptr;   // [rows]
    const int64_t* starts = nullptr;  // [rows]
    int64_t rows = 0;
};

// A step of cached attention, as mimo_fast/kernels/decode_attention.py says.
struct DecodeAttention {
    Type type = Type::float32;         // of qkv, y and the cache
    int64_t heads = 0, kv_heads = 0, head_dim = 0;
    const float* table = nullptr;      // [2, positions, head_dim / 2]: cosines, sines
    int64_t positions = 0;
    const void* qkv = nullptr;         // [rows, (heads + 2 kv_heads) head_dim], rows `row_stride` elements apart
    int64_t row_stride = 0;
    void* y = nullptr;                 // [rows, heads head_dim]
    Cache cache;                       // of one layer
    Positions at;
};

struct Layer {
    const float* attention_norm;
    Linear qkv, out;
    const float* ffn_norm;
    Linear gate_up, down;
};

// A Qwen2-style transformer in float32.
struct Transformer {
    std::vector<Layer> layers;
    const float* norm;   // [dim], of the result
    float eps;
    const float* table;  // [2, positions, head_dim / 2]: cosines, sines
    int64_t positions, dim, heads, kv_heads, head_dim;

    int64_t qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }

    // Multiplications of a row with the weights.
    int64_t work() const {
        int64_t total = 0;
        for (const Layer& layer : layers)
            total += layer.qkv.size() + layer.out.size() + layer.gate_up.size() + layer.down.size();
        return total;
    }
};

// Settings of rows that draw an id each, as `SamplerTensors` has them, and what names their noise.
struct SamplerRows {
    const float* temperature;
    const int64_t* top_k;
    const float* tail;
    const bool* greedy;
    const int64_t* seeds;
    const int64_t* draws;
    int64_t rows;
};

// Rows of logits to draw from.
struct Logits {
    const float* values;    // [rows, size]
    const bool* banned;     // rows `banned_stride` apart, or null for none
    int64_t banned_stride;  // size, or 0 where all rows share one
    int64_t size;
    uint32_t slot;          // of the noise
};

// As mimo_fast/kernels/sample_codes.py says of one step.
struct CodeStep {
    const int64_t* heads;  // [5, active]: channel, frame, first row in the table, size and empty id of each
    int64_t active;
};

struct PatchDecoder {
    Transformer transformer;
    const float* heads;       // [table rows, dim]
    const float* embeddings;  // [table rows, dim]
    int64_t channels, group_size;
    std::vector<CodeStep> steps;
};

// LayerNorm, or RMSNorm where there is no bias.
struct Norm {
    const float* weight;
    const float* bias;
};

struct CodecLayer {
    Norm attention_norm;
    Linear qkv, out;
    Norm ffn_norm;
    Linear up, down;
};

struct CodecStack {
    std::vector<CodecLayer> layers;
    int64_t dim, heads;
    float eps;  // of the norms
};

// What T rows attend to. The key and value of row t go to place slots[t] first, in every layer.
struct CodecAttention {
    const float* table;    // [2, T, head_dim / 2]: cosines and sines of the rows' positions
    float* k;              // [layers, heads, places, head_dim], contiguous
    float* v;
    const int64_t* slots;  // [T]
    const bool* visible;   // [T, places]
    int64_t places;
};

// Whole sequences, their rows one after the other. A row sees those of its sequence from `left` before to `right` after its
// own.
struct CodecSequences {
    const int64_t* lengths;  // [count], rows of each
    int64_t count;
    const float* table;      // [2, rows, head_dim / 2]: cosines and sines of the rows' positions
    int64_t left, right;
};

// A causal transposed convolution, kernel >= stride, with the norm over time that follows it.
struct TransposedConv {
    Linear weight;            // [kernel outputs, inputs]: row j outputs + o has the weights of tap j
    const float* bias;        // [outputs]
    const float* norm_weight;
    const float* norm_bias;
    int64_t kernel, stride, outputs;

    int64_t overlap() const { return kernel - stride; }
};

// Tables of `codec_tables.h`.
struct Rotations {
    int64_t half = 0, count = 0;      // pairs of values; positions
    std::vector<double> frequencies;  // [half]
    std::vector<double> cosines, sines;  // [count, half]: of positions 0 ... count - 1
};

struct InverseStft {
    int64_t size = 0, hop = 0;      // n_fft, even
    std::vector<float> window;      // [size], divided by size
    std::vector<float> weights;     // [size]: squares of the window
    std::vector<int64_t> radices;   // whose product is size / 2
    std::vector<float> twiddles;    // of each stage in turn: [size / 2 at first, fewer later, 2]
    std::vector<float> halves;      // [size / 2, 2]: e^(2 pi i k / size)
    std::vector<float> roots;       // [largest radix, 2] of each stage in turn: e^(2 pi i k / radix)
};

// The decoder of an audio tokenizer, a chunk of a stream at a time: mimo_fast/runtime/codec/incremental.py.
struct CodecDecoder {
    CodecStack decoder, vocoder;
    bool pools = false;
    TransposedConv unpool, to_mel;  // unpool: kernel = stride, where the codec pools
    Norm decoder_norm, vocoder_norm;
    Linear vocoder_in, vocoder_out;
    int64_t context = 0;            // positions before its own that a position of the decoder sees
    int64_t left = 0, right = 0;    // frames around its own that a frame of the vocoder sees
    int64_t decoder_block = 0, vocoder_block = 0;  // positions and new frames computed at once
    Rotations decoder_rotations, vocoder_rotations;
    InverseStft stft;

    int64_t pool() const { return pools ? unpool.stride : 1; }
    int64_t kept_outputs() const { return (to_mel.overlap() + to_mel.stride - 1) / to_mel.stride; }
};

// A tensor of every stream, `stride` values from one to the next.
template <class T>
struct Pooled {
    T* values = nullptr;
    int64_t stride = 0, layer_stride = 0;  // the last of keys and values alone

    T* at(int64_t row) const { return values + row * stride; }
};

// States of `rows` streams, as mimo_fast/runtime/codec/state.py says.
struct CodecBuffers {
    int64_t rows, entered_rows, ring;
    Pooled<int64_t> position, frame, unpool_expected, to_mel_expected;
    Pooled<double> unpool_sums, to_mel_sums, prior;
    Pooled<float> entered, added, history, tail, given, decoder_k, decoder_v, vocoder_k, vocoder_v;
};

// The next codes of one stream.
struct CodecChunk {
    const CodecBuffers* buffers;
    int64_t row;
    const float* hidden;  // [codes, dim], dequantized
    int64_t codes;
    int64_t frames, committed;  // before it; frames = 0: from the start, and of the state only `tail` is read
    int64_t lookahead;          // frames that are held back
    int known;                  // statistics: 0 of the stream alone, 1 with the prior, 2 given
    bool ended, settled;        // no codes follow; statistics are not extrapolated
    float* samples;             // [samples_after]

    int64_t frames_after(const CodecDecoder& d) const { return frames + codes * d.pool() * d.to_mel.stride; }
    int64_t committed_after(const CodecDecoder& d) const {
        const int64_t after = frames_after(d), held = after - lookahead;
        return ended ? after : held > committed ? held : committed;
    }
    int64_t samples_after(const CodecDecoder& d) const {
        const int64_t hop = d.stft.hop, trim = (d.stft.size - hop) / 2, begin = committed * hop;
        const int64_t end = committed_after(d) * hop + (ended ? trim : 0), first = begin > trim ? begin : trim;
        return end > first ? end - first : 0;
    }
};

}  // namespace mimo_fast
