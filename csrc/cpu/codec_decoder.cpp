// Codes to vocoder frames. All rows of a group of streams pass a product together, so that its weights are read once;
// attention, statistics and buffers are each stream's own. Sums over time are in double precision.

#include "codec_decoder.h"

#include <omp.h>

#include "attend.h"
#include "codec_stack.h"
#include "linear.h"
#include "threads.h"

namespace mimo_fast::MIMO_FAST_SET {
namespace {

constexpr float NORM_EPS = 1e-5f;

// Streams of a group, and multiplications after which a group takes no more of them.
constexpr int64_t MOST_STREAMS = 8;
constexpr int64_t ENOUGH_WORK = int64_t(1) << 28;

// Sums over rows of (1, mean, mean square), and of those times the row's place.
void add_moments(double* sums, const float* rows, int64_t count, int64_t width, int64_t first) {
    for (int64_t r = 0; r < count; ++r, rows += width) {
        const int64_t place = first + r;
        if (place < 0) continue;
        double total = 0, squares = 0;
        for (int64_t i = 0; i < width; ++i) {
            const double value = rows[i];
            total += value;
            squares += value * value;
        }
        const double moments[3] = {1, total / double(width), squares / double(width)};
        for (int i = 0; i < 3; ++i) {
            sums[i] += moments[i];
            sums[3 + i] += (double(place) + 0.5) * moments[i];
        }
    }
}

struct Statistics {
    float mean, variance;
};

Statistics from_sums(double count, double total, double squares) {
    const double mean = total / count;
    return {float(mean), float(squares / count - mean * mean)};
}

// `norm_statistics` of prior.py.
Statistics statistics_of(const CodecChunk& c, const double* sums, int64_t expected, const double* prior,
                         const float* given) {
    if (c.known == 2) return {given[0], given[1]};
    if (c.known == 1 && !c.settled && prior[0] > 0)
        return from_sums(prior[0] + sums[0], prior[1] + sums[1], prior[2] + sums[2]);
    const double missing = c.settled || double(expected) < sums[0] ? 0 : double(expected) - sums[0];
    const double* later = sums + 3;
    return from_sums(sums[0] + missing, sums[1] + missing * later[1] / later[0], sums[2] + missing * later[2] / later[0]);
}

// x [count, outputs] in place.
void normalise(const TransposedConv& conv, Statistics by, int64_t count, float* x) {
    const float inverse = 1 / std::sqrt(by.variance + NORM_EPS);
    for (int64_t r = 0; r < count; ++r, x += conv.outputs)
        for (int64_t i = 0; i < conv.outputs; ++i)
            x[i] = (x[i] - by.mean) * (inverse * conv.norm_weight[i]) + conv.norm_bias[i];
}

// Inputs of the decoder's layers, pending and new [all rows, dim].
void enter(const CodecDecoder& d, Buffer<Stream>& streams, int64_t codes, float* entered) {
    const int64_t dim = d.decoder.dim, pool = d.pool();
    Buffer<float> hidden(codes * dim), pooled(d.pools ? codes * pool * dim : 0);
    for (const Stream& s : streams)
        std::memcpy(hidden.data() + s.codes_at * dim, s.chunk->hidden, s.chunk->codes * dim * sizeof(float));
    if (d.pools) {
        multiply(d.unpool.weight, hidden.data(), codes, pooled.data());
        for (int64_t r = 0; r < codes * pool; ++r)
            for (int64_t i = 0; i < dim; ++i) pooled[r * dim + i] += d.unpool.bias[i];
    }
    const float* source = d.pools ? pooled.data() : hidden.data();
    for (const Stream& s : streams) {
        const CodecChunk& c = *s.chunk;
        const CodecBuffers& b = *c.buffers;
        const int64_t pending = s.rows - s.added_rows;
        float *rows = entered + s.rows_at * dim, *kept = b.entered.at(c.row), *added = rows + pending * dim;
        double* sums = b.unpool_sums.at(c.row);
        if (c.frames) std::memcpy(rows, kept, pending * dim * sizeof(float));
        std::memcpy(added, source + s.codes_at * pool * dim, s.added_rows * dim * sizeof(float));
        std::memmove(kept, rows + s.added_rows * dim, pending * dim * sizeof(float));
        if (!c.frames) std::memset(sums, 0, 6 * sizeof(double));
        if (!d.pools) continue;
        add_moments(sums, added, s.added_rows, dim, s.position);
        const Statistics by = statistics_of(c, sums, *b.unpool_expected.at(c.row), b.prior.at(c.row), b.given.at(c.row));
        normalise(d.unpool, by, s.rows, rows);
    }
}

// A block of new positions of each stream: x [rows, dim], those of a stream `counts` from `starts` on, in place.
void run_block(const CodecDecoder& d, const Buffer<Stream>& streams, int64_t done, const int64_t* counts, float* x,
               int64_t M) {
    const CodecStack& stack = d.decoder;
    const int64_t dim = stack.dim, dh = dim / stack.heads, half = dh / 2;
    Buffer<float> normed(M * dim), qkv(M * 3 * dim), attended(M * dim), cosines(M * half), sines(M * half), wide, weights;
    Buffer<int64_t> from(M), to(M);
    for (int64_t i = 0, at = 0; i < streams.size(); at += counts[i++]) {
        const int64_t position = streams[i].position + done;
        rotation_rows(d.decoder_rotations, position, counts[i], cosines.data() + at * half, sines.data() + at * half);
    }
    for (size_t l = 0; l < stack.layers.size(); ++l) {
        const CodecLayer& layer = stack.layers[l];
        apply_norm(layer.attention_norm, stack.eps, x, M, dim, normed.data());
        multiply(layer.qkv, normed.data(), M, qkv.data());
        for (int64_t i = 0, at = 0; i < streams.size(); at += counts[i++]) {
            const CodecChunk& c = *streams[i].chunk;
            const CodecBuffers& b = *c.buffers;
            const int64_t position = streams[i].position + done, n = counts[i];
            if (!n) continue;
            float *k = b.decoder_k.at(c.row) + int64_t(l) * b.decoder_k.layer_stride;
            float *v = b.decoder_v.at(c.row) + int64_t(l) * b.decoder_v.layer_stride;
            for (int64_t t = 0; t < n; ++t) {
                float* row = qkv.data() + (at + t) * 3 * dim;
                const float *cosine = cosines.data() + (at + t) * half, *sine = sines.data() + (at + t) * half;
                for (int64_t h = 0; h < 2 * stack.heads; ++h) rotate_head(row + h * dh, cosine, sine, half);
                for (int64_t h = 0; h < stack.heads; ++h) {
                    const int64_t place = (h * b.ring + (position + t) % b.ring) * dh;
                    std::memcpy(k + place, row + dim + h * dh, dh * sizeof(float));
                    std::memcpy(v + place, row + 2 * dim + h * dh, dh * sizeof(float));
                }
            }
            // The oldest position that a row of the block sees, and where the ring wraps after it.
            const int64_t first = most(0, position - d.context), count = position + n - first, slot = first % b.ring;
            const int64_t straight = least(count, b.ring - slot);
            for (int64_t t = 0; t < n; ++t) {
                from[t] = most(first, position + t - d.context) - first;
                to[t] = position + t + 1 - first;
            }
            for (int64_t h = 0; h < stack.heads; ++h) {
                const float *keys = k + h * b.ring * dh, *values = v + h * b.ring * dh;
                const Run runs[2] = {{keys + slot * dh, values + slot * dh, dh, straight},
                                     {keys, values, dh, count - straight}};
                attend_runs(qkv.data() + at * 3 * dim + h * dh, 3 * dim, n, runs, from.data(), to.data(), dh, weights,
                            attended.data() + at * dim + h * dh, dim);
            }
        }
        finish_layer(stack, layer, attended.data(), M, x, normed.data(), wide);
    }
}

// What the layers add to their inputs, pending and new [all rows, dim].
void run_layers(const CodecDecoder& d, const Buffer<Stream>& streams, const float* entered, float* added) {
    const int64_t dim = d.decoder.dim;
    Buffer<float> x;
    Buffer<int64_t> counts(streams.size());
    for (int64_t done = 0;; done += d.decoder_block) {
        int64_t M = 0;
        for (int64_t i = 0; i < streams.size(); ++i)
            M += counts[i] = most(0, least(d.decoder_block, streams[i].added_rows - done));
        if (!M) break;
        x.reserve(M * dim);
        const auto each = [&](const auto& act) {
            for (int64_t i = 0, at = 0; i < streams.size(); at += counts[i++]) {
                const Stream& s = streams[i];
                act((s.rows_at + s.rows - s.added_rows + done) * dim, at * dim, counts[i] * dim);
            }
        };
        each([&](int64_t from, int64_t at, int64_t n) { std::memcpy(&x[at], entered + from, n * sizeof(float)); });
        run_block(d, streams, done, counts.data(), x.data(), M);
        each([&](int64_t from, int64_t at, int64_t n) {
            for (int64_t i = 0; i < n; ++i) added[from + i] = x[at + i] - entered[from + i];
        });
    }
    for (const Stream& s : streams) {
        const int64_t pending = s.rows - s.added_rows;
        float *rows = added + s.rows_at * dim, *kept = s.chunk->buffers->added.at(s.chunk->row);
        if (s.chunk->frames) std::memcpy(rows, kept, pending * dim * sizeof(float));
        std::memmove(kept, rows + s.added_rows * dim, pending * dim * sizeof(float));
    }
}

// Normed vocoder frames of one stream, pending and new, from products of its inputs with the convolution's taps.
void to_frames(const CodecDecoder& d, const Stream& s, const float* products, Buffer<float>& out, float* mel) {
    const TransposedConv& conv = d.to_mel;
    const CodecChunk& c = *s.chunk;
    const CodecBuffers& b = *c.buffers;
    const int64_t width = conv.outputs, history = d.kept_outputs(), inputs = history + s.rows;
    const int64_t count = s.rows * conv.stride + conv.overlap(), first = (s.position - (s.rows - s.added_rows)) * conv.stride;
    out.reserve(count * width);
    for (int64_t r = 0; r < count; ++r)
        for (int64_t i = 0; i < width; ++i) out[r * width + i] = conv.bias[i];
    for (int64_t t = 0; t < inputs; ++t)
        for (int64_t j = 0; j < conv.kernel; ++j) {
            const int64_t r = (t - history) * conv.stride + j;
            if (r < 0 || r >= count) continue;
            const float* from = products + (t * conv.kernel + j) * width;
            for (int64_t i = 0; i < width; ++i) out[r * width + i] += from[i];
        }
    double *sums = b.to_mel_sums.at(c.row), all[6];
    if (!c.frames) std::memset(sums, 0, 6 * sizeof(double));
    const int64_t final_rows = s.added_rows * conv.stride;
    add_moments(sums, out.data(), final_rows, width, first);
    std::memcpy(all, sums, sizeof all);
    add_moments(all, out.data() + final_rows * width, count - final_rows, width, first + final_rows);
    // At the end the sums are those of the whole stream, which later ones may begin with.
    if (c.ended) std::memcpy(sums, all, sizeof all);
    const Statistics by =
        statistics_of(c, all, *b.to_mel_expected.at(c.row), b.prior.at(c.row) + 3, b.given.at(c.row) + 2);
    std::memcpy(mel + s.mel_at * width, out.data(), s.rows * conv.stride * width * sizeof(float));
    normalise(conv, by, s.rows * conv.stride, mel + s.mel_at * width);
}

// Streams first ... last - 1, on this thread.
void decode_group(const CodecDecoder& d, const CodecChunk* chunks, int64_t count) {
    const int64_t dim = d.decoder.dim, history = d.kept_outputs(), taps = d.to_mel.kernel * d.to_mel.outputs;
    Buffer<Stream> streams(count);
    int64_t codes = 0, added_rows = 0, rows = 0, frames = 0;
    for (int64_t i = 0; i < count; ++i) {
        const CodecChunk& c = chunks[i];
        Stream& s = streams[i];
        s.chunk = &c;
        s.codes_at = codes;
        s.added_rows = c.codes * d.pool();
        s.added_at = added_rows;
        s.rows = c.buffers->entered_rows + s.added_rows;
        s.rows_at = rows;
        s.position = c.frames / d.to_mel.stride;
        s.mel_at = frames;
        codes += c.codes;
        added_rows += s.added_rows;
        rows += s.rows;
        frames += s.rows * d.to_mel.stride;
    }
    Buffer<float> entered(rows * dim), added(rows * dim), inputs((rows + count * history) * dim);
    enter(d, streams, codes, entered.data());
    run_layers(d, streams, entered.data(), added.data());
    for (int64_t i = 0; i < rows * dim; ++i) added[i] += entered[i];
    apply_norm(d.decoder_norm, d.decoder.eps, added.data(), rows, dim, entered.data());
    for (int64_t i = 0; i < count; ++i) {
        const Stream& s = streams[i];
        const CodecChunk& c = *s.chunk;
        const int64_t first = s.position - (s.rows - s.added_rows);
        float *to = inputs.data() + (s.rows_at + i * history) * dim, *kept = c.buffers->history.at(c.row);
        if (c.frames) std::memcpy(to, kept, history * dim * sizeof(float));
        // Rows before position 0 stay zero, so that the convolution adds nothing of them.
        const int64_t skipped = most(0, -first);
        std::memcpy(to + (history + skipped) * dim, entered.data() + (s.rows_at + skipped) * dim,
                    (s.rows - skipped) * dim * sizeof(float));
        std::memmove(kept, to + s.added_rows * dim, history * dim * sizeof(float));
    }
    Buffer<float> products((rows + count * history) * taps), mel(frames * d.to_mel.outputs), out;
    multiply(d.to_mel.weight, inputs.data(), rows + count * history, products.data());
    for (int64_t i = 0; i < count; ++i)
        to_frames(d, streams[i], products.data() + (streams[i].rows_at + i * history) * taps, out, mel.data());
    vocode(d, streams, mel.data());
    for (const Stream& s : streams) {
        const CodecChunk& c = *s.chunk;
        *c.buffers->position.at(c.row) = s.position + s.added_rows;
        *c.buffers->frame.at(c.row) = c.frames_after(d);
    }
}

}  // namespace

void rotation_rows(const Rotations& table, int64_t first, int64_t count, float* cosines, float* sines) {
    const int64_t half = table.half;
    // By the sum of angles: of every table.count-th position, and of the positions after it.
    for (int64_t i = 0; i < half; ++i)
        for (int64_t p = 0; p < count;) {
            const double angle = double(first + p) * table.frequencies[i], c = std::cos(angle), s = std::sin(angle);
            for (int64_t j = 0; j < table.count && p < count; ++j, ++p) {
                const double cosine = table.cosines[j * half + i], sine = table.sines[j * half + i];
                cosines[p * half + i] = float(c * cosine - s * sine);
                sines[p * half + i] = float(s * cosine + c * sine);
            }
        }
}

void decode_chunks(const CodecDecoder& d, const CodecChunk* chunks, int64_t count) {
    const int64_t position = stack_work(d.decoder), frame = stack_work(d.vocoder);
    const auto work = [&](const CodecChunk& c) {
        const int64_t rows = c.codes * d.pool();
        return rows * position + (c.buffers->entered_rows + rows) * d.to_mel.stride * frame;
    };
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += work(chunks[i]);
    const int threads = count ? threads_of(count, total) : 1;
    // Groups large enough to share weights, small enough to go round.
    const int64_t enough = threads == 1 ? ENOUGH_WORK : least(ENOUGH_WORK, total / (2 * threads));
    Buffer<int64_t> ends(count);
    int64_t groups = 0;
    for (int64_t i = 0, begin = 0, sum = 0; i < count; ++i) {
        sum += work(chunks[i]);
        if (sum < enough && i + 1 - begin < MOST_STREAMS && i + 1 < count) continue;
        ends[groups++] = begin = i + 1;
        sum = 0;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t begin = g ? ends[g - 1] : 0;
        decode_group(d, chunks + begin, ends[g] - begin);
    }
}

}  // namespace mimo_fast::MIMO_FAST_SET
