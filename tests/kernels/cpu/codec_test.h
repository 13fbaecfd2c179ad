// A codec's decoder of random weights, states for its streams, and what it computes where its stacks have no layers.
#pragma once

#include <complex>

#include "codec_tables.h"
#include "reference.h"

namespace reference {

struct Codec {
    std::deque<Matrix> matrices;
    std::deque<Floats> vectors;
    CodecDecoder native;

    Codec(int64_t layers, int64_t dim, int64_t heads, int64_t pool, int64_t kernel, int64_t stride, int64_t n_mels,
          int64_t size, int64_t hop, bool layer_norms) {
        const auto vector = [&](int64_t count, double scale, double mean) -> const float* {
            vectors.push_back(gaussian(count, scale, mean));
            return vectors.back().data();
        };
        const auto matrix = [&](int64_t rows, int64_t columns, bool bias) -> const Linear& {
            matrices.emplace_back(rows, columns, bias);
            return matrices.back().linear;
        };
        const auto norm = [&] { return Norm{vector(dim, 0.1, 1), layer_norms ? vector(dim, 0.1, 0) : nullptr}; };
        const auto convolution = [&](int64_t outputs, int64_t kernel, int64_t stride) {
            return TransposedConv{matrix(kernel * outputs, dim, false), vector(outputs, 0.1, 0), vector(outputs, 0.1, 1),
                                  vector(outputs, 0.1, 0), kernel, stride, outputs};
        };
        native.to_mel = convolution(n_mels, kernel, stride);
        native.vocoder_in = matrix(dim, n_mels, false);
        native.vocoder_out = matrix(size + 2, dim, true);
        native.pools = pool > 1;
        if (native.pools) native.unpool = convolution(dim, pool, pool);
        native.decoder_norm = norm();
        native.vocoder_norm = norm();
        for (CodecStack* stack : {&native.decoder, &native.vocoder}) {
            *stack = {{}, dim, heads, 1e-5f};
            for (int64_t i = 0; i < layers; ++i)
                stack->layers.push_back({norm(), matrix(3 * dim, dim, true), matrix(dim, dim, true), norm(),
                                         matrix(2 * dim, dim, true), matrix(dim, 2 * dim, true)});
        }
        native.context = 20;
        native.left = 7;
        native.right = 3;
        native.decoder_block = 16;
        native.vocoder_block = 24;
        const Floats frequencies = gaussian(dim / heads / 2, 0.3);
        native.decoder_rotations = make_rotations(frequencies.data(), dim / heads / 2, 8);
        native.vocoder_rotations = native.decoder_rotations;
        native.stft = make_inverse_stft(vector(size, 0.1, 1), size, hop);
    }
};

// The state of one stream, full of poison where a stream's begin does not read it.
struct CodecState {
    std::vector<int64_t> counters = std::vector<int64_t>(4, 0);
    Doubles sums = Doubles(18, NAN);
    Floats rows, tail, given, keys;
    CodecBuffers buffers;

    CodecState(const CodecDecoder& d, int64_t entered_rows) {
        const int64_t dim = d.decoder.dim, dh = dim / d.decoder.heads, ring = d.context + d.decoder_block;
        const int64_t layers = int64_t(d.decoder.layers.size()), history = d.kept_outputs();
        rows = Floats((2 * entered_rows + history) * dim, NAN);
        tail = Floats(2 * (d.stft.size - d.stft.hop), NAN);
        given = {0.1f, 1.3f, -0.2f, 0.8f};
        const int64_t decoder_size = d.decoder.heads * ring * dh, vocoder_size = d.vocoder.heads * d.left * dh;
        keys = Floats(2 * layers * (decoder_size + vocoder_size), NAN);
        float *k = keys.data(), *v = k + layers * decoder_size, *vk = v + layers * decoder_size;
        counters[2] = counters[3] = 40;
        buffers = {1, entered_rows, ring, {&counters[0], 1, 0}, {&counters[1], 1, 0}, {&counters[2], 1, 0},
                   {&counters[3], 1, 0}, {&sums[0], 6, 0}, {&sums[6], 6, 0}, {&sums[12], 6, 0}, {rows.data(), 0, 0},
                   {&rows[entered_rows * dim], 0, 0}, {&rows[2 * entered_rows * dim], 0, 0}, {tail.data(), 0, 0},
                   {given.data(), 0, 0}, {k, 0, decoder_size}, {v, 0, decoder_size}, {vk, 0, vocoder_size},
                   {vk + layers * vocoder_size, 0, vocoder_size}};
    }
    CodecState(const CodecState&) = delete;
};

// LayerNorm, or RMSNorm where there is no bias, of x [rows, dim].
inline Doubles codec_norm(const Doubles& x, const Norm& norm, int64_t dim, double eps) {
    Doubles y;
    for (size_t row = 0; row < x.size(); row += dim) {
        double mean = 0, variance = 0;
        for (int64_t i = 0; i < dim && norm.bias; ++i) mean += x[row + i] / double(dim);
        for (int64_t i = 0; i < dim; ++i) variance += (x[row + i] - mean) * (x[row + i] - mean) / double(dim);
        for (int64_t i = 0; i < dim; ++i)
            y.push_back((x[row + i] - mean) / std::sqrt(variance + eps) * norm.weight[i] + (norm.bias ? norm.bias[i] : 0));
    }
    return y;
}

// The convolution of x [rows, inputs] and its norm by a mean and a variance: [rows stride, outputs].
inline Doubles convolve(const TransposedConv& conv, const Matrix& taps, const Doubles& x, const float* given) {
    const int64_t rows = int64_t(x.size()) / conv.weight.columns, width = conv.outputs;
    const Doubles products = taps.multiply(x);
    Doubles y(rows * conv.stride * width);
    for (int64_t r = 0; r < rows * conv.stride; ++r)
        for (int64_t i = 0; i < width; ++i) {
            double total = conv.bias[i];
            for (int64_t t = 0; t <= r / conv.stride; ++t) {
                const int64_t j = r - t * conv.stride;
                if (j < conv.kernel) total += products[(t * conv.kernel + j) * width + i];
            }
            y[r * width + i] = (total - given[0]) / std::sqrt(given[1] + 1e-5) * conv.norm_weight[i] + conv.norm_bias[i];
        }
    return y;
}

// The whole waveform of hidden [codes, dim] with given statistics, by a decoder without layers.
inline Doubles synthesize(const Codec& codec, const Doubles& hidden, const float* given) {
    const CodecDecoder& d = codec.native;
    const int64_t dim = d.decoder.dim, size = d.stft.size, hop = d.stft.hop, bins = size / 2 + 1;
    Doubles x = hidden;
    if (d.pools) x = convolve(d.unpool, codec.matrices[3], x, given);
    x = convolve(d.to_mel, codec.matrices[0], codec_norm(x, d.decoder_norm, dim, d.decoder.eps), given + 2);
    x = codec_norm(codec.matrices[1].multiply(x), d.vocoder_norm, dim, d.vocoder.eps);
    const Doubles head = codec.matrices[2].multiply(x);
    const int64_t T = int64_t(head.size()) / (2 * bins), count = (T - 1) * hop + size, trim = (size - hop) / 2;
    Doubles wave(count), weight(count);
    for (int64_t t = 0; t < T; ++t) {
        const double* row = &head[t * 2 * bins];
        for (int64_t i = 0; i < size; ++i) {
            double sample = 0;
            for (int64_t k = 0; k < bins; ++k) {
                const double magnitude = std::min(std::exp(row[k]), 100.0), turn = 2 * std::acos(-1.0) * double(k * i % size);
                const double part = magnitude * (std::cos(row[bins + k]) * std::cos(turn / double(size)) -
                                                 (k % (bins - 1) ? std::sin(row[bins + k]) * std::sin(turn / double(size)) : 0));
                sample += (k % (bins - 1) ? 2 : 1) * part / double(size);
            }
            const double w = std::sqrt(double(d.stft.weights[i]));
            wave[t * hop + i] += sample * w;
            weight[t * hop + i] += w * w;
        }
    }
    Doubles samples;
    for (int64_t i = trim; i < trim + T * hop; ++i) samples.push_back(wave[i] / weight[i]);
    return samples;
}

// hidden in pieces, each stream of `states` the same; samples of all pieces of stream `which`.
inline Floats decode_in_pieces(void (*decode)(const CodecDecoder&, const CodecChunk*, int64_t), const Codec& codec,
                               std::deque<CodecState>& states, const std::vector<Floats>& hidden,
                               const std::vector<int64_t>& pieces, int known, int64_t lookahead, size_t which) {
    const CodecDecoder& d = codec.native;
    const int64_t dim = d.decoder.dim;
    int64_t done = 0, frames = 0, committed = 0;
    Floats all;
    for (size_t p = 0; p < pieces.size(); ++p) {
        std::vector<CodecChunk> chunks;
        std::vector<Floats> samples;
        const bool ended = p + 1 == pieces.size();
        for (size_t i = 0; i < states.size(); ++i) {
            chunks.push_back({&states[i].buffers, 0, hidden[i].data() + done * dim, pieces[p], frames, committed, lookahead,
                              known, ended, ended, nullptr});
            samples.emplace_back(chunks[i].samples_after(d), NAN);
            chunks[i].samples = samples[i].data();
        }
        decode(d, chunks.data(), int64_t(chunks.size()));
        all.insert(all.end(), samples[which].begin(), samples[which].end());
        frames = chunks[0].frames_after(d);
        committed = chunks[0].committed_after(d);
        done += pieces[p];
    }
    return all;
}

}  // namespace reference
