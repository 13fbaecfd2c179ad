// Vocoder frames to samples. Pending frames are computed again with each chunk; of every layer only what somebody needs:
// outputs of the last one for the frames that become final, outputs of earlier ones for those and the frames around them
// that they see, keys and values for those and for the frames that the next chunk sees. A stream that is decoded again
// from its first code so skips the frames that are in the waveform already, but for those that later ones see.

#include <omp.h>

#include "attend.h"
#include "codec_decoder.h"
#include "codec_stack.h"
#include "inverse_stft.h"
#include "linear.h"

namespace mimo_fast::MIMO_FAST_SET {
namespace {

// A stream's part of a block: frames before it, after it, in the waveform before it and after it.
struct Part {
    const Stream* stream = nullptr;
    int64_t before = 0, after = 0, committed = 0, decided = 0;
    int64_t first = 0;  // frames from here on are computed again or anew; earlier ones have final keys and values
    bool last = false;
    Buffer<int64_t> low, high;  // [layers + 1] of the inputs of each layer, which have keys and values; of the last outputs

    int64_t count(size_t layer) const { return high[layer] - low[layer]; }
};

// What a part needs; `base`: frames from here on are needed after the chunk.
void choose_ranges(const CodecDecoder& d, int64_t pending, int64_t base, Part& p) {
    const int64_t layers = int64_t(d.vocoder.layers.size());
    p.low.reserve(layers + 1);
    p.high.reserve(layers + 1);
    for (int64_t i = 0; i <= layers; ++i) {
        const int64_t later = p.after - pending + d.right * (layers - 1 - i);
        int64_t end = p.decided > p.committed ? most(later, p.decided + d.right * (layers - i)) : later;
        p.low[i] = most(p.first, base - d.left * (layers - i));
        if (i == layers) {
            p.low[i] = p.committed;
            end = p.decided;
        }
        p.high[i] = most(p.low[i], least(end, p.after));
    }
    if (p.decided <= p.committed) p.high[layers] = p.low[layers];
}

// Keys and values of a layer for the frames before the next chunk's pending ones.
void keep(const CodecDecoder& d, const Part& p, int64_t pending, size_t layer, const float* qkv) {
    const CodecChunk& c = *p.stream->chunk;
    const int64_t dim = d.vocoder.dim, dh = dim / d.vocoder.heads, kept = d.left, added = p.after - p.before;
    const int64_t begin = p.after - pending - kept;
    const Pooled<float> tensors[2] = {c.buffers->vocoder_k, c.buffers->vocoder_v};
    for (int part = 0; part < 2; ++part)
        for (int64_t h = 0; h < d.vocoder.heads; ++h) {
            float* to = tensors[part].at(c.row) + int64_t(layer) * tensors[part].layer_stride + h * kept * dh;
            if (added < kept) std::memmove(to, to + added * dh, (kept - added) * dh * sizeof(float));
            for (int64_t f = most(p.low[layer], begin); f < least(p.high[layer], begin + kept); ++f)
                std::memcpy(to + (f - begin) * dh, qkv + (f - p.low[layer]) * 3 * dim + (1 + part) * dim + h * dh,
                            dh * sizeof(float));
        }
}

// Attention of a layer's output frames: qkv of its inputs, rotated already -> attended [outputs, dim].
void attend_part(const CodecDecoder& d, const Part& p, size_t layer, const float* qkv, Buffer<int64_t>& from,
                 Buffer<int64_t>& to, Buffer<float>& weights, float* attended) {
    const CodecChunk& c = *p.stream->chunk;
    const Pooled<float>&k = c.buffers->vocoder_k, &v = c.buffers->vocoder_v;
    const int64_t dim = d.vocoder.dim, dh = dim / d.vocoder.heads, low = p.low[layer], outputs = p.count(layer + 1);
    // Frames that are kept end where the part begins; where it begins later, nobody sees them.
    const int64_t kept = low == p.first ? least(d.left, p.first) : 0, begin = low - kept;
    from.reserve(outputs);
    to.reserve(outputs);
    for (int64_t t = 0; t < outputs; ++t) {
        const int64_t frame = p.low[layer + 1] + t;
        from[t] = most(begin, frame - d.left) - begin;
        to[t] = least(p.high[layer], frame + d.right + 1) - begin;
    }
    for (int64_t h = 0; h < d.vocoder.heads; ++h) {
        const int64_t at = int64_t(layer) * k.layer_stride + (h * d.left + d.left - kept) * dh;
        const int64_t also = int64_t(layer) * v.layer_stride + (h * d.left + d.left - kept) * dh;
        const Run runs[2] = {{k.at(c.row) + at, v.at(c.row) + also, dh, kept},
                             {qkv + dim + h * dh, qkv + 2 * dim + h * dh, 3 * dim, p.count(layer)}};
        attend_runs(qkv + (p.low[layer + 1] - low) * 3 * dim + h * dh, 3 * dim, outputs, runs, from.data(), to.data(),
                    dh, weights, attended + h * dh, dim);
    }
}

// Adds windowed frames [T, size] of the part to its tail; what is final now becomes samples, whose end is returned.
float* overlap_add(const InverseStft& stft, const Part& p, const float* frames, float* samples) {
    const CodecChunk& c = *p.stream->chunk;
    const int64_t T = p.decided - p.committed, hop = stft.hop, overlap = stft.size - hop, trim = overlap / 2;
    const int64_t done = T * hop, count = done + overlap;
    float* tail = c.buffers->tail.at(c.row);
    Buffer<float> wave(count), weight(count);
    std::memcpy(wave.data(), tail, overlap * sizeof(float));
    std::memcpy(weight.data(), tail + overlap, overlap * sizeof(float));
    for (int64_t t = 0; t < T; ++t)
        for (int64_t i = 0; i < stft.size; ++i) {
            wave[t * hop + i] += frames[t * stft.size + i];
            weight[t * hop + i] += stft.weights[i];
        }
    std::memcpy(tail, wave.data() + done, overlap * sizeof(float));
    std::memcpy(tail + overlap, weight.data() + done, overlap * sizeof(float));
    const int64_t end = p.last ? done + trim : done;
    for (int64_t i = most(0, trim - p.committed * hop); i < end; ++i) *samples++ = wave[i] / weight[i];
    return samples;
}

// A block of each part: normed mel to samples.
void vocode_block(const CodecDecoder& d, Buffer<Part>& parts, const float* mel, Buffer<float*>& samples) {
    const CodecStack& stack = d.vocoder;
    const int64_t dim = stack.dim, dh = dim / stack.heads, half = dh / 2, n_mels = d.to_mel.outputs;
    const size_t layers = stack.layers.size();
    int64_t M = 0;
    for (const Part& p : parts) M += p.count(0);
    Buffer<float> x(M * most(dim, n_mels)), y(M * dim), normed(M * dim), qkv(M * 3 * dim), attended(M * dim);
    Buffer<float> cosines(M * half), sines(M * half), wide, weights;
    Buffer<int64_t> from, to;
    for (int64_t i = 0, at = 0; i < parts.size(); at += parts[i++].count(0)) {
        const Part& p = parts[i];
        const Stream& s = *p.stream;
        const int64_t pending = s.rows * d.to_mel.stride - (s.chunk->frames_after(d) - s.chunk->frames);
        const int64_t row = s.mel_at + p.low[0] - (s.chunk->frames - pending);
        if (!p.count(0)) continue;
        std::memcpy(&x[at * n_mels], mel + row * n_mels, p.count(0) * n_mels * sizeof(float));
        rotation_rows(d.vocoder_rotations, p.low[0], p.count(0), &cosines[at * half], &sines[at * half]);
    }
    multiply(d.vocoder_in, x.data(), M, y.data());
    for (size_t l = 0; l < layers; ++l) {
        const CodecLayer& layer = stack.layers[l];
        int64_t rows = 0, outputs = 0, turned = 0;
        for (const Part& p : parts) rows += p.count(l);
        apply_norm(layer.attention_norm, stack.eps, y.data(), rows, dim, normed.data());
        multiply(layer.qkv, normed.data(), rows, qkv.data());
        rows = 0;
        for (const Part& p : parts) {
            const Stream& s = *p.stream;
            float* own = qkv.data() + rows * 3 * dim;
            for (int64_t t = 0; t < p.count(l); ++t) {
                const int64_t at = (turned + p.low[l] - p.low[0] + t) * half;
                for (int64_t h = 0; h < 2 * stack.heads; ++h)
                    rotate_head(own + t * 3 * dim + h * dh, cosines.data() + at, sines.data() + at, half);
            }
            attend_part(d, p, l, own, from, to, weights, attended.data() + outputs * dim);
            keep(d, p, s.rows * d.to_mel.stride - (s.chunk->frames_after(d) - s.chunk->frames), l, own);
            std::memcpy(x.data() + outputs * dim, y.data() + (rows + p.low[l + 1] - p.low[l]) * dim,
                        p.count(l + 1) * dim * sizeof(float));
            rows += p.count(l);
            outputs += p.count(l + 1);
            turned += p.count(0);
        }
        std::memcpy(y.data(), x.data(), outputs * dim * sizeof(float));
        finish_layer(stack, layer, attended.data(), outputs, y.data(), normed.data(), wide);
        M = outputs;
    }
    Buffer<float> head(M * d.vocoder_out.rows), frames(M * d.stft.size);
    apply_norm(d.vocoder_norm, stack.eps, y.data(), M, dim, normed.data());
    multiply(d.vocoder_out, normed.data(), M, head.data());
    inverse_stft(d.stft, head.data(), M, frames.data());
    for (int64_t i = 0, at = 0; i < parts.size(); at += parts[i++].count(layers))
        samples[i] = overlap_add(d.stft, parts[i], frames.data() + at * d.stft.size, samples[i]);
}

}  // namespace

void vocode(const CodecDecoder& d, const Buffer<Stream>& streams, const float* mel) {
    Buffer<float*> all(streams.size());
    Buffer<int64_t> committed(streams.size());
    for (int64_t i = 0; i < streams.size(); ++i) {
        const CodecChunk& c = *streams[i].chunk;
        all[i] = c.samples;
        committed[i] = c.committed;
        if (!c.committed) std::memset(c.buffers->tail.at(c.row), 0, 2 * (d.stft.size - d.stft.hop) * sizeof(float));
    }
    for (int64_t done = 0;; done += d.vocoder_block) {
        int64_t count = 0;
        const auto takes_part = [&](const Stream& s) {
            const int64_t added = s.chunk->frames_after(d) - s.chunk->frames;
            return !done || done < added;
        };
        for (const Stream& s : streams) count += takes_part(s);
        if (!count) return;
        Buffer<Part> parts(count);
        Buffer<float*> samples(count);
        Buffer<int64_t> places(count);
        count = 0;
        for (int64_t i = 0; i < streams.size(); ++i) {
            const Stream& s = streams[i];
            const CodecChunk& c = *s.chunk;
            if (!takes_part(s)) continue;
            const int64_t whole = c.frames_after(d), pending = s.rows * d.to_mel.stride - (whole - c.frames);
            Part& p = parts[count];
            p.stream = &s;
            p.before = c.frames + done;
            p.after = least(whole, p.before + d.vocoder_block);
            p.committed = committed[i];
            p.last = c.ended && p.after == whole;
            p.decided = p.last ? p.after : most(p.committed, p.after - c.lookahead);
            p.first = most(0, p.before - pending);
            choose_ranges(d, pending, least(c.committed, whole - pending), p);
            committed[i] = p.decided;
            samples[count] = all[i];
            places[count++] = i;
        }
        vocode_block(d, parts, mel, samples);
        for (int64_t j = 0; j < count; ++j) all[places[j]] = samples[j];
    }
}

}  // namespace mimo_fast::MIMO_FAST_SET
