// Every kernel of every instruction set that this CPU runs, against scalar references in double precision: random
// inputs, odd shapes, outputs that hold poison before and guards behind. Needs neither Python nor torch, so that it runs
// under an emulator too. Exits with 1 where something is off.
//
//     kernels_test [SET]    one set alone; it must be there

#include <omp.h>

#include <cstdarg>
#include <cstdio>
#include <string>

#include "codec_test.h"
#include "instruction_set.h"
#include "reference.h"
#include "threads.h"

using namespace reference;

namespace {

const Kernels* kernels;
int64_t checked, failed;

constexpr uint64_t CHECKSUM = 0x676A1CE2A58281A;

void report(bool right, const char* format, ...) __attribute__((format(printf, 2, 3)));
void report(bool right, const char* format, ...) {
    ++checked;
    if (right) return;
    ++failed;
    std::printf("%s: ", kernels->name);
    va_list values;
    va_start(values, format);
    std::vprintf(format, values);
    va_end(values);
    std::printf("\n");
}

// An output of `count` values: poison, and 64 guards behind it.
struct Output {
    int64_t count;
    Floats values;
    std::vector<uint16_t> narrow;

    explicit Output(int64_t count) : count(count), values(count + 64, NAN), narrow(count + 64, 0x7FC1) {}
    void* data(Type type) { return type == Type::float32 ? static_cast<void*>(values.data()) : narrow.data(); }

    // Largest error beside the largest value; infinity for poison, or where a guard was overwritten.
    double error(const Doubles& want, Type type = Type::float32) const {
        double worst = 0, largest = 1e-30;
        for (int64_t i = 0; i < count; ++i) {
            const double got = type == Type::float32 ? values[i] : from_bfloat16(narrow[i]);
            if (!std::isfinite(got)) return INFINITY;
            worst = std::max(worst, std::fabs(got - want[i]));
            largest = std::max(largest, std::fabs(want[i]));
        }
        for (int64_t i = count; i < count + 64; ++i)
            if (!std::isnan(values[i]) || narrow[i] != 0x7FC1) return INFINITY;
        return worst / largest;
    }
};

// x W^T of M rows to y.
QuantizedMatmul product(const Matrix& w, const float* x, int64_t M, float* y) {
    QuantizedMatmul p;
    p.weight = w.linear.quantized;
    p.x = x;
    p.y = y;
    p.M = M;
    return p;
}

constexpr double FLOAT_ERROR = 1e-5;  // of sums in float32, beside the largest value
constexpr double FIXED_ERROR = 2e-4;  // of x in fixed point of 16 bits
constexpr double BFLOAT16_ERROR = 4e-3;

void test_quantized_matmul(int bits, int64_t group, int64_t groups, int64_t rows, int64_t M, int options, Type type) {
    const bool has_zeros = options & 1, has_bias = options & 2, has_norm = options & 4, has_residual = options & 8;
    const bool gated = (options & 16) && rows % 2 == 0;
    const int64_t K = group * groups, outputs = gated ? rows / 2 : rows;
    const Matrix w(rows, K, has_bias, bits, group, has_zeros);
    Stored x(type, gaussian(M * K)), norm(type, gaussian(K, 0.2, 1)), residual(type, gaussian(M * outputs));
    Stored bias(type, w.biases);
    QuantizedMatmul p;
    p.weight = w.linear.quantized;
    p.type = type;
    p.bias = has_bias ? bias.data() : nullptr;
    p.norm = has_norm ? norm.data() : nullptr;
    p.eps = 0.01f;
    p.swiglu = gated;
    p.x = x.data();
    p.residual = has_residual ? residual.data() : nullptr;
    p.M = M;
    Doubles want = has_norm ? rms_norm(wide(x.wide), norm.wide, p.eps) : wide(x.wide);
    want = w.multiply(want);
    if (has_bias)
        for (int64_t i = 0; i < M * rows; ++i) want[i] += bias.wide[i % rows] - w.bias[i % rows];
    if (gated) want = swiglu(want, rows);
    if (has_residual) Model::add(want, wide(residual.wide));
    Output y(M * outputs);
    p.y = y.data(type);
    kernels->quantized_matmul(p);
    const double error = y.error(want, type);
    report(error <= (type == Type::float32 ? FIXED_ERROR : BFLOAT16_ERROR),
           "quantized_matmul: error %g; %d bits, group %ld, N %ld, K %ld, M %ld, options %d", error, bits, group, rows,
           K, M, options);
    // A row does not depend on the others.
    if (type == Type::float32 && M > 1) {
        Output alone(outputs);
        const int64_t m = below(M);
        p.x = x.wide.data() + m * K;
        p.y = alone.values.data();
        p.residual = has_residual ? residual.wide.data() + m * outputs : nullptr;
        p.M = 1;
        kernels->quantized_matmul(p);
        report(!std::memcmp(alone.values.data(), &y.values[m * outputs], outputs * sizeof(float)),
               "quantized_matmul: row %ld of %ld depends on its neighbours", m, M);
    }
}

// The largest q with the largest x throughout: no sum may wrap. All is a power of two, so that the result is exact.
void test_extremes() {
    for (const int bits : {4, 8})
        for (const int64_t group : {64, 128})
            for (const float sign : {1.0f, -1.0f}) {
                const int64_t K = 1024, offset = int64_t(1) << (bits - 1);
                Matrix w(3, K, false, bits, group, false);
                std::fill(w.words.begin(), w.words.end(), ~0u);
                std::fill(w.scales.begin(), w.scales.end(), uint16_t(0x3F80));
                for (const int64_t M : {3, 13}) {
                    const Floats x(M * K, sign);
                    Output y(3 * M);
                    kernels->quantized_matmul(product(w, x.data(), M, y.values.data()));
                    const double error = y.error(Doubles(3 * M, sign * double(K * (offset - 1))));
                    report(error <= 1e-5, "quantized_matmul: extremes of %d bits are off by %g", bits, error);
                }
            }
}

void test_values_that_are_no_numbers() {
    for (const int bits : {4, 8})
        for (const float bad : {NAN, INFINITY, -INFINITY})
            for (const int64_t M : {2, 12})
                for (const Type type : {Type::float32, Type::bfloat16}) {
                    const Matrix w(11, 256, false, bits, 128, true);
                    Floats wide = gaussian(M * 256);
                    wide[17] = bad;
                    Stored x(type, wide);
                    Output y(11 * M);
                    QuantizedMatmul p = product(w, wide.data(), M, nullptr);
                    p.type = type;
                    p.x = x.data();
                    p.y = y.data(type);
                    kernels->quantized_matmul(p);
                    bool right = true;
                    for (int64_t i = 0; i < 11 * M; ++i) {
                        const float got = type == Type::float32 ? y.values[i] : from_bfloat16(y.narrow[i]);
                        right &= std::isfinite(got) == (i >= 11);
                    }
                    report(right, "quantized_matmul: %g passes as a number, or reaches another row", double(bad));
                }
}

void test_decode_attention(int64_t rows, int64_t kv_heads, int64_t share, int64_t dh, int64_t capacity, Type type) {
    const int64_t heads = kv_heads * share, width = (heads + 2 * kv_heads) * dh, stride = width + 3, slots = rows + 1;
    const Floats table = rotations(capacity, dh / 2);
    Stored qkv(type, gaussian(rows * stride));
    Stored k(type, gaussian(slots * kv_heads * capacity * dh)), v(type, gaussian(slots * kv_heads * capacity * dh));
    std::vector<int64_t> slot(rows), start(rows);
    for (int64_t r = 0; r < rows; ++r) {
        slot[r] = rows - r;
        start[r] = r == 2 ? -1 : r == 3 ? capacity : below(capacity);
    }
    const Stored k_before = k, v_before = v;
    Output y(rows * heads * dh);
    const Cache cache = {k.data(), v.data(), 1, slots, capacity, 0, kv_heads * capacity * dh, capacity * dh, dh};
    kernels->decode_attention({type, heads, kv_heads, dh, table.data(), capacity, qkv.data(), stride, y.data(type),
                               cache, {slot.data(), start.data(), rows}});
    Doubles want(rows * heads * dh);
    int64_t changed = 0, written = 0;
    for (int64_t i = 0; i < slots * kv_heads * capacity * dh; ++i)
        changed += k.at(i) != k_before.at(i) || v.at(i) != v_before.at(i);
    double append_error = 0;
    const double rounding = type == Type::float32 ? 1e-6 : 1.0 / 256;
    for (int64_t r = 0; r < rows; ++r) {
        if (start[r] < 0 || start[r] >= capacity) continue;
        const Doubles row = wide(Floats(&qkv.wide[r * stride], &qkv.wide[r * stride] + width));
        const float *cosines = &table[start[r] * dh / 2], *sines = cosines + capacity * dh / 2;
        for (int64_t g = 0; g < kv_heads; ++g) {
            const int64_t first = (slot[r] * kv_heads + g) * capacity * dh, last = first + start[r] * dh;
            const Doubles key = rotated(&row[(heads + g) * dh], dh, cosines, sines);
            std::vector<Doubles> keys, values;
            for (int64_t i = 0; i < dh; ++i) {
                append_error = std::max(append_error, std::fabs(k.at(last + i) - key[i]) / (std::fabs(key[i]) + 0.1));
                append_error = std::max<double>(
                    append_error, std::fabs(v.at(last + i) - row[(heads + kv_heads + g) * dh + i]));
            }
            written += dh;
            for (int64_t at = first; at <= last; at += dh) {
                keys.push_back(k.part(at, dh));
                values.push_back(v.part(at, dh));
            }
            for (int64_t h = g * share; h < (g + 1) * share; ++h) {
                const Doubles one = attend(rotated(&row[h * dh], dh, cosines, sines), keys, values);
                std::copy(one.begin(), one.end(), &want[(r * heads + h) * dh]);
            }
        }
    }
    report(append_error <= rounding && changed <= written, "decode_attention: appends with error %g, %ld values of %ld",
           append_error, changed, written);
    const double error = y.error(want, type);
    report(error <= (type == Type::float32 ? FLOAT_ERROR : BFLOAT16_ERROR),
           "decode_attention: error %g; %ld rows, %ld x %ld heads of %ld, capacity %ld", error, rows, kv_heads, share,
           dh, capacity);
}

void test_transformer(const Model& model, double tolerance) {
    const Transformer& t = model.native;
    const int64_t N = 3, T = 7, dim = t.dim;
    const Floats x = gaussian(N * T * dim);
    for (const bool causal : {false, true}) {
        Output y(N * T * dim);
        kernels->encode(t, x.data(), y.values.data(), N, T, causal);
        Doubles want;
        for (int64_t n = 0; n < N; ++n) {
            const Doubles one = model.run(wide(Floats(&x[n * T * dim], &x[n * T * dim] + T * dim)), causal);
            want.insert(want.end(), one.begin(), one.end());
        }
        const double error = y.error(want);
        report(error <= tolerance, "encode: error %g, causal %d, dim %ld", error, causal, dim);
        if (!causal) continue;
        // Position by position through a cache it is the same.
        const int64_t slots = N + 1, head = t.positions * t.head_dim, slot = t.kv_heads * head;
        const int64_t layers = int64_t(t.layers.size());
        Floats k(layers * slots * slot, 1e4f), v(k);
        const Cache cache = {k.data(), v.data(), layers, slots, t.positions, slots * slot, slot, head, t.head_dim};
        for (int64_t i = 0; i < T; ++i) {
            const std::vector<int64_t> at = {3, 0, 2}, starts(N, i);
            Floats rows;
            Doubles expected;
            for (int64_t n = 0; n < N; ++n) {
                rows.insert(rows.end(), &x[(n * T + i) * dim], &x[(n * T + i) * dim] + dim);
                expected.insert(expected.end(), &want[(n * T + i) * dim], &want[(n * T + i) * dim] + dim);
            }
            Output stepped(N * dim);
            kernels->step(t, rows.data(), stepped.values.data(), cache, {at.data(), starts.data(), N});
            const double off = stepped.error(expected);
            report(off <= tolerance, "step: error %g at position %ld, dim %ld", off, i, dim);
        }
        const bool kept = std::all_of(&k[slot], &k[2 * slot], [](float value) { return value == 1e4f; });
        report(kept, "step: a slot of no row was written to");
    }
}

// Every number of rows has the bits of rows alone, whatever tiles it is cut into and whoever computes them.
void test_multiply(const Matrix& w) {
    const int64_t rows = w.rows, columns = w.columns;
    const int64_t most = 200;
    const Floats x = gaussian(most * columns);
    Output alone(most * rows);
    for (int64_t m = 0; m < most; ++m) kernels->multiply(w.linear, &x[m * columns], 1, &alone.values[m * rows]);
    const double error = alone.error(w.multiply(wide(x)));
    report(error <= (w.linear.blocks.empty() ? FIXED_ERROR : FLOAT_ERROR), "multiply: error %g; N %ld, K %ld", error,
           rows, columns);
    for (int64_t M = 2; M <= most; M = M < 17 ? M + 1 : M < 48 ? 48 : M + 152) {
        Output y(M * rows);
        kernels->multiply(w.linear, x.data(), M, y.values.data());
        report(y.error(Doubles(alone.values.begin(), alone.values.begin() + M * rows)) == 0 &&
                   !std::memcmp(y.values.data(), alone.values.data(), M * rows * sizeof(float)),
               "multiply: %ld rows differ from rows alone; N %ld, K %ld", M, rows, columns);
    }
}

// Prompts of several slots in one call, cut anywhere, by one thread and by several, have the bits of single positions.
void test_prompts(const Model& model) {
    const Transformer& t = model.native;
    const int64_t slots = 5, T = t.positions, dim = t.dim, layers = int64_t(t.layers.size());
    const int64_t head = T * t.head_dim, slot = t.kv_heads * head, size = layers * slots * slot;
    const Floats x = gaussian(slots * T * dim);
    const auto run = [&](int64_t chunk, Floats& k, Floats& v) {
        const Cache cache = {k.data(), v.data(), layers, slots, T, slots * slot, slot, head, t.head_dim};
        Floats hidden(slots * T * dim);
        for (int64_t first = 0; first < T; first += chunk) {
            Floats in, out;
            std::vector<int64_t> at, starts;
            for (int64_t s = 0; s < slots; ++s)
                for (int64_t i = first; i < std::min(first + chunk, T); ++i) {
                    at.push_back(s);
                    starts.push_back(i);
                    in.insert(in.end(), &x[(s * T + i) * dim], &x[(s * T + i) * dim] + dim);
                }
            out.resize(in.size());
            kernels->step(t, in.data(), out.data(), cache, {at.data(), starts.data(), int64_t(at.size())});
            for (size_t r = 0; r < at.size(); ++r)
                std::copy(&out[r * dim], &out[r * dim] + dim, &hidden[(at[r] * T + starts[r]) * dim]);
        }
        return hidden;
    };
    Floats k(size, NAN), v(size, NAN);
    const Floats want = run(1, k, v);
    for (const int64_t chunk : {T, int64_t(5)})
        for (const bool alone : {false, true}) {
            Floats keys(size, NAN), values(size, NAN);
            if (alone) narrow();
            const int threads = threads_for(slots * chunk, t.work());
            const Floats got = run(chunk, keys, values);
            if (alone) widen();
            report(chunk != T || threads > 1, "step: prompts were not divided among threads");
            report(got == want && keys == k && values == v, "step: prompts in chunks of %ld differ from positions", chunk);
        }
}

// A patch of each of many rows, divided among threads, is that of a row alone; a sequence's encoding likewise.
void test_many_rows(const Model& model) {
    const Transformer& t = model.native;
    const int64_t rows = 24, dim = t.dim, T = 3, size = 40;
    const Floats table = gaussian(size * dim), local = gaussian(rows * dim), x = gaussian(rows * T * dim);
    const std::vector<int64_t> first = {0, 0, 0, size, 3}, second = {0, 1, 0, size, 3};
    const PatchDecoder p = {t, table.data(), table.data(), 1, 2, {{first.data(), 1}, {second.data(), 1}}};
    const Floats temperature(rows, 0.9f), tail(rows, 0);
    const std::vector<int64_t> top_k(rows, 0), seeds(rows, 11), draws(rows, 1);
    const bool greedy[24] = {true, false};
    std::vector<int64_t> codes(rows * 2), one(2);
    kernels->decode_patch(p, local.data(), codes.data(),
                          {temperature.data(), top_k.data(), tail.data(), greedy, seeds.data(), draws.data(), rows});
    Floats encoded(rows * T * dim), alone(T * dim);
    kernels->encode(t, x.data(), encoded.data(), rows, T, true);
    report(threads_for(rows, 2 * t.work()) > 1, "decode_patch: rows were not divided among threads");
    for (int64_t r = 0; r < rows; ++r) {
        kernels->decode_patch(p, &local[r * dim], one.data(),
                              {&temperature[r], &top_k[r], &tail[r], greedy + r, &seeds[r], &draws[r], 1});
        report(std::equal(one.begin(), one.end(), &codes[2 * r]), "decode_patch: row %ld depends on the others", r);
        kernels->encode(t, &x[r * T * dim], alone.data(), 1, T, true);
        report(std::equal(alone.begin(), alone.end(), &encoded[r * T * dim]), "encode: row %ld depends on the others", r);
    }
}

// Convolutions, norms and synthesis, in pieces of any size, with given statistics: windows of all kinds of sizes.
void test_synthesis(int64_t size, int64_t hop, int64_t pool, int64_t kernel, int64_t stride) {
    const Codec codec(0, 24, 3, pool, kernel, stride, 16, size, hop, size % 4);
    const std::vector<Floats> hidden = {gaussian(13 * 24)};
    for (const std::vector<int64_t>& pieces : {std::vector<int64_t>{13}, {1, 2, 3, 4, 3, 0}}) {
        std::deque<reference::CodecState> states;
        states.emplace_back(codec.native, 2);
        const Floats got = decode_in_pieces(kernels->decode_chunks, codec, states, hidden, pieces, 2, stride, 0);
        const Doubles want = synthesize(codec, wide(hidden[0]), states[0].given.data());
        Output out(int64_t(got.size()));
        std::copy(got.begin(), got.end(), out.values.begin());
        const double error = got.size() == want.size() ? out.error(want) : INFINITY;
        report(error <= 2e-5, "decode_chunks: error %g, size %ld, hop %ld, pool %ld, kernel %ld, stride %ld", error, size,
               hop, pool, kernel, stride);
    }
}

// Streams with layers: the same bits alone, with others, and by several threads; the same samples in other pieces.
void test_streams(bool layer_norms) {
    const Codec codec(2, 48, 2, 2, 5, 2, 16, 60, 12, layer_norms);
    const size_t count = 9;
    std::vector<Floats> hidden;
    for (size_t i = 0; i < count; ++i) hidden.push_back(gaussian(60 * 48));
    const auto run = [&](const std::vector<size_t>& who, const std::vector<int64_t>& pieces, int known, size_t which) {
        std::deque<reference::CodecState> states;
        std::vector<Floats> own;
        for (const size_t i : who) {
            states.emplace_back(codec.native, 4);
            std::fill(&states.back().sums[12], &states.back().sums[12] + 6, 0);
            own.push_back(hidden[i]);
        }
        return decode_in_pieces(kernels->decode_chunks, codec, states, own, pieces, known, 8, which);
    };
    const std::vector<int64_t> pieces = {5, 30, 1, 0, 24};
    const std::vector<size_t> all = {0, 1, 2, 3, 4, 5, 6, 7, 8};
    for (const int known : {0, 1, 2})
        for (const size_t i : {size_t(0), size_t(7)})
            report(run(all, pieces, known, i) == run({i}, pieces, known, 0), "decode_chunks: stream %zu depends on others", i);
    // With given statistics every frame sees the same, however the codes come.
    const Floats whole = run({3}, {60}, 2, 0), cut = run({3}, pieces, 2, 0);
    Output out(int64_t(cut.size()));
    std::copy(cut.begin(), cut.end(), out.values.begin());
    const double error = whole.size() == cut.size() ? out.error(wide(whole)) : INFINITY;
    report(error <= 1e-4, "decode_chunks: error %g between pieces and the whole", error);
}

void test_decode_patch(const Model& model) {
    const Transformer& t = model.native;
    const int64_t channels = 2, group = 3, rows = 4, dim = t.dim, sizes[] = {37, 21}, firsts[] = {0, 37}, empty[] = {36, 5};
    const Floats heads = gaussian(58 * dim, 0.4), embeddings = gaussian(58 * dim), local = gaussian(rows * dim);
    std::vector<std::vector<int64_t>> steps;  // channel c is one step late
    for (int64_t s = 0; s < group + 1; ++s) {
        std::vector<int64_t> active;
        for (int64_t c = 0; c < channels; ++c)
            if (s - c >= 0 && s - c < group) active.push_back(c);
        steps.emplace_back(active);
        for (const int64_t c : active) steps.back().push_back(s - c);
        for (const int64_t* of : {firsts, sizes, empty})
            for (const int64_t c : active) steps.back().push_back(of[c]);
    }
    PatchDecoder p = {t, heads.data(), embeddings.data(), channels, group, {}};
    for (const auto& values : steps) p.steps.push_back({values.data(), int64_t(values.size()) / 5});
    const Floats temperature = {1, 0.7f, 1.3f, 1}, tail(rows, 0);
    const std::vector<int64_t> top_k(rows, 0), seeds = {1, -5, 7, int64_t(1) << 40}, draws = {0, 3, 2, 1};
    const bool greedy[] = {true, false, false, true};
    std::vector<int64_t> codes(rows * channels * group, -7);
    kernels->decode_patch(p, local.data(), codes.data(),
                          {temperature.data(), top_k.data(), tail.data(), greedy, seeds.data(), draws.data(), rows});
    for (int64_t r = 0; r < rows; ++r) {
        Doubles sequence(&local[r * dim], &local[r * dim] + dim);
        for (const auto& values : steps) {
            const int64_t n = int64_t(values.size()) / 5;
            const Doubles hidden = model.run(sequence, true);
            Doubles next(dim);
            for (int64_t a = 0; a < n; ++a) {
                const int64_t c = values[a], frame = values[n + a], first = values[2 * n + a], size = values[3 * n + a];
                Floats logits, noise(size);
                for (int64_t i = 0; i < size; ++i)
                    logits.push_back(float(std::inner_product(hidden.end() - dim, hidden.end(),
                                                              &heads[(first + i) * dim], 0.0)));
                kernels->gumbel(seeds[r], draws[r], uint32_t(1 + frame), uint32_t(first), size, noise.data());
                const int64_t want = draw(logits.data(), size, [&](int64_t i) { return i != empty[c]; },
                                          temperature[r], 0, 0, greedy[r], noise);
                const int64_t got = codes[(r * channels + c) * group + frame];
                report(got == want, "decode_patch: code %ld, not %ld, of row %ld", got, want, r);
                for (int64_t i = 0; i < dim; ++i) next[i] += embeddings[(first + want) * dim + i];
            }
            sequence.insert(sequence.end(), next.begin(), next.end());
        }
    }
}

// The rows of x [T, dim] as three sequences, of which one is empty, with layer 1 skipped to the end: what
// `run_codec_stack` gives where rows see the same ones, and for each sequence the bits that it has alone.
void test_codec_sequences(const CodecStack& stack, const Floats& x, const Floats& table, int64_t T) {
    const int64_t dim = stack.dim, half = dim / stack.heads / 2, lengths[3] = {T / 3, 0, T - T / 3}, left = 3, right = 1;
    Floats want = x, early = x;
    CodecStack first = {{stack.layers[0]}, dim, stack.heads, stack.eps};
    std::vector<char> visible(T * T);
    for (int64_t t = 0; t < T; ++t)
        for (int64_t s = 0; s < T; ++s)
            visible[t * T + s] = (t < lengths[0]) == (s < lengths[0]) && s >= t - left && s <= t + right;
    std::vector<int64_t> slots(T);
    std::iota(slots.begin(), slots.end(), 0);
    Floats k(stack.layers.size() * T * dim), v(k.size());
    const CodecAttention seen = {table.data(), k.data(), v.data(), slots.data(),
                                 reinterpret_cast<const bool*>(visible.data()), T};
    kernels->run_codec_stack(stack, want.data(), T, seen);
    kernels->run_codec_stack(first, early.data(), T, seen);
    for (int64_t i = 0; i < T * dim; ++i) want[i] += early[i];
    Output y(T * dim);
    std::copy(x.begin(), x.end(), y.values.begin());
    kernels->run_codec_sequences(stack, y.values.data(), {lengths, 3, table.data(), left, right}, 1);
    const double error = y.error(wide(want));
    report(error <= FLOAT_ERROR, "run_codec_sequences: error %g; %ld rows", error, T);
    for (int64_t start = 0, i = 0; i < 3; start += lengths[i++]) {
        const int64_t rows = lengths[i];
        Floats alone(x.begin() + start * dim, x.begin() + (start + rows) * dim), own;
        for (int64_t part = 0; part < 2; ++part)
            own.insert(own.end(), table.begin() + (part * T + start) * half,
                       table.begin() + (part * T + start + rows) * half);
        kernels->run_codec_sequences(stack, alone.data(), {lengths + i, 1, own.data(), left, right}, 1);
        report(std::equal(alone.begin(), alone.end(), y.values.begin() + start * dim),
               "run_codec_sequences: sequence %ld of %ld rows has other bits alone", i, rows);
    }
}

void test_codec_stack(int64_t T, int64_t heads, int64_t dh, int64_t ffn, bool layer_norms) {
    const int64_t dim = heads * dh, places = T + 5, layers = 2, half = dh / 2;
    std::deque<Matrix> matrices;
    std::deque<Floats> norms;
    CodecStack stack = {{}, dim, heads, 1e-5f};
    for (int64_t i = 0; i < layers; ++i) {
        for (int n = 0; n < 4; ++n) norms.push_back(gaussian(dim, 0.1, n % 2 ? 0 : 1));
        const auto norm = [&](int64_t n) {
            return Norm{norms[n].data(), layer_norms ? norms[n + 1].data() : nullptr};
        };
        matrices.emplace_back(3 * dim, dim, true);
        matrices.emplace_back(dim, dim, true);
        matrices.emplace_back(ffn, dim, true);
        matrices.emplace_back(dim, ffn, true);
        stack.layers.push_back({norm(4 * i), matrices[4 * i].linear, matrices[4 * i + 1].linear, norm(4 * i + 2),
                                matrices[4 * i + 2].linear, matrices[4 * i + 3].linear});
    }
    const Floats input = gaussian(T * dim), angles = gaussian(T * half);
    Floats table(2 * T * half), k = gaussian(layers * heads * places * dh), v = gaussian(layers * heads * places * dh);
    for (int64_t i = 0; i < T * half; ++i) {
        table[i] = std::cos(angles[i]);
        table[T * half + i] = std::sin(angles[i]);
    }
    std::vector<int64_t> slots(places);
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), generator);
    std::vector<char> visible(T * places);
    for (int64_t i = 0; i < T * places; ++i) visible[i] = below(2) || i % places == slots[i / places];
    Doubles x = wide(input), keys = wide(k), values = wide(v);
    const auto normed = [&](int64_t n) {
        return layer_norms ? layer_norm(x, norms[n], norms[n + 1], stack.eps) : rms_norm(x, norms[n], stack.eps);
    };
    for (int64_t i = 0; i < layers; ++i) {
        const Doubles qkv = matrices[4 * i].multiply(normed(4 * i));
        const auto head = [&](int64_t t, int64_t h) {
            return rotated(&qkv[t * 3 * dim + h * dh], dh, &table[t * half], &table[(T + t) * half]);
        };
        const auto place = [&](int64_t h, int64_t s) { return ((i * heads + h) * places + s) * dh; };
        Doubles attended;
        for (int64_t t = 0; t < T; ++t)
            for (int64_t h = 0; h < heads; ++h) {
                const Doubles key = head(t, heads + h);
                std::copy(key.begin(), key.end(), &keys[place(h, slots[t])]);
                std::copy_n(&qkv[t * 3 * dim + 2 * dim + h * dh], dh, &values[place(h, slots[t])]);
            }
        for (int64_t t = 0; t < T; ++t)
            for (int64_t h = 0; h < heads; ++h) {
                std::vector<Doubles> seen_keys, seen_values;
                for (int64_t s = 0; s < places; ++s) {
                    if (!visible[t * places + s]) continue;
                    seen_keys.emplace_back(&keys[place(h, s)], &keys[place(h, s)] + dh);
                    seen_values.emplace_back(&values[place(h, s)], &values[place(h, s)] + dh);
                }
                const Doubles y = attend(head(t, h), seen_keys, seen_values);
                attended.insert(attended.end(), y.begin(), y.end());
            }
        Model::add(x, matrices[4 * i + 1].multiply(attended));
        Doubles up = matrices[4 * i + 2].multiply(normed(4 * i + 2));
        for (double& value : up) value *= (1 + std::erf(value / std::sqrt(2.0))) / 2;
        Model::add(x, matrices[4 * i + 3].multiply(up));
    }
    Output y(T * dim), got_k(int64_t(k.size())), got_v(int64_t(v.size()));
    std::copy(input.begin(), input.end(), y.values.begin());
    std::copy(k.begin(), k.end(), got_k.values.begin());
    std::copy(v.begin(), v.end(), got_v.values.begin());
    kernels->run_codec_stack(stack, y.values.data(), T,
                             {table.data(), got_k.values.data(), got_v.values.data(), slots.data(),
                              reinterpret_cast<const bool*>(visible.data()), places});
    test_codec_sequences(stack, input, table, T);
    const double error = std::max({y.error(x), got_k.error(keys), got_v.error(values)});
    report(error <= FLOAT_ERROR, "run_codec_stack: error %g; %ld rows, %ld heads of %ld, layer norms %d", error, T,
           heads, dh, layer_norms);
}

void test_sample(int64_t size, double scale) {
    const int64_t rows = 12;
    Floats values = gaussian(rows * size, scale);
    for (float& value : values)
        if (below(4) == 0) value = std::round(value);  // ties
    std::vector<char> banned(rows * size);
    for (int64_t i = 0; i < rows * size; ++i) banned[i] = below(5) == 0 && i % size;
    Floats temperature, tail;
    std::vector<int64_t> top_k, seeds, draws, ids(rows, -7);
    std::vector<char> greedy;
    for (int64_t r = 0; r < rows; ++r) {
        temperature.push_back(0.5f + 0.1f * float(r));
        tail.push_back(r % 3 ? 0.05f * float(r) : 0);
        top_k.push_back(r % 4 ? 3 * r : 0);
        seeds.push_back(int64_t(generator()) << (r * 3));
        draws.push_back(below(100));
        greedy.push_back(r == 5);
    }
    const SamplerRows settings = {temperature.data(), top_k.data(), tail.data(),
                                  reinterpret_cast<const bool*>(greedy.data()), seeds.data(), draws.data(), rows};
    for (const bool bans : {false, true}) {
        kernels->sample({values.data(), bans ? reinterpret_cast<const bool*>(banned.data()) : nullptr, size, size, 4},
                        settings, ids.data());
        for (int64_t r = 0; r < rows; ++r) {
            Floats noise(size);
            kernels->gumbel(seeds[r], draws[r], 4, 0, size, noise.data());
            const auto allowed = [&](int64_t i) { return !bans || !banned[r * size + i]; };
            const int64_t want = draw(&values[r * size], size, allowed, temperature[r], top_k[r], tail[r], greedy[r],
                                      noise);
            report(ids[r] == want, "sample: %ld, not %ld, of %ld ids in row %ld", ids[r], want, size, r);
        }
    }
}

// Philox 4x32-10 by its definition (Salmon et al. 2011), first word.
uint32_t philox(uint64_t key, uint32_t x0, uint32_t x1, uint32_t x2) {
    uint32_t x3 = 0, k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const uint64_t a = uint64_t(x0) * 0xD2511F53u, b = uint64_t(x2) * 0xCD9E8D57u;
        x0 = uint32_t(b >> 32) ^ x1 ^ k0;
        x1 = uint32_t(b);
        x2 = uint32_t(a >> 32) ^ x3 ^ k1;
        x3 = uint32_t(a);
    }
    return x0;
}

// Noise bit for bit; returns a checksum of its bits, which must be the same on every machine.
uint64_t test_gumbel() {
    uint64_t checksum = 0xCBF29CE484222325u;
    for (const int64_t seed : {int64_t(0), int64_t(7), int64_t(-1), int64_t(1) << 40})
        for (const int64_t count : {1, 63, 64, 65, 3001}) {
            Output noise(count);
            kernels->gumbel(seed, 5, 2, 514, count, noise.values.data());
            bool right = std::isnan(noise.values[count]);
            for (int64_t i = 0; i < count; ++i) {
                const double uniform = (double(philox(uint64_t(seed), uint32_t(514 + i), 5, 2)) + 0.5) * 0x1p-32;
                right &= noise.values[i] == -float(std::log(-std::log(1 - uniform)));
                uint32_t bits;
                std::memcpy(&bits, &noise.values[i], 4);
                checksum = (checksum ^ bits) * 0x100000001B3u;
            }
            report(right, "gumbel: noise is not that of its definition, seed %ld", seed);
        }
    return checksum;
}

// Integer sums are the same in every set; what is float around them may be rounded otherwise.
Floats results(const Kernels& set) {
    generator.seed(2);
    Floats all;
    for (const int bits : {4, 8})
        for (const int64_t group : {32, 64, 128}) {
            if (bits == 4 && group == 32) continue;
            const Matrix w(37, 1280, true, bits, group, true);
            for (const int64_t M : {3, 21}) {
                const Floats x = gaussian(M * 1280);
                Floats y(M * 37);
                QuantizedMatmul p = product(w, x.data(), M, y.data());
                p.bias = w.biases.data();
                set.quantized_matmul(p);
                all.insert(all.end(), y.begin(), y.end());
            }
        }
    return all;
}

uint64_t test_set() {
    generator.seed(1);
    for (int i = 0; i < 120; ++i) {
        const int bits = i % 2 ? 8 : 4;
        const int64_t group = bits == 4 ? 64 << below(3) : 32 << below(4);
        test_quantized_matmul(bits, group, 1 + below(11), 1 + below(40), 1 + below(6), int(below(32)),
                              i % 3 ? Type::float32 : Type::bfloat16);
    }
    // Tiles of many rows: W in several pieces, tiles that are not full, more rows than one slab has.
    for (int i = 0; i < 40; ++i) {
        const int bits = i % 2 ? 8 : 4;
        const int64_t group = bits == 4 ? 64 << below(3) : 32 << below(4);
        test_quantized_matmul(bits, group, 1 + below(14), 1 + below(90), 5 + below(30), int(below(32)),
                              i % 4 ? Type::float32 : Type::bfloat16);
    }
    for (const int bits : {4, 8}) {
        test_quantized_matmul(bits, 128, 19, 33, 17, 15, Type::float32);
        test_quantized_matmul(bits, 256, 2, 40, 257 + below(20), 31, Type::float32);
    }
    // Large enough to be shared between threads.
    test_quantized_matmul(4, 128, 8, 600, 3, 31, Type::float32);
    test_extremes();
    test_values_that_are_no_numbers();
    for (const Type type : {Type::float32, Type::bfloat16})
        for (int i = 0; i < 12; ++i)
            test_decode_attention(1 + below(5), 1 + below(3), 1 + below(4), 8 * (1 + below(9)), 1 + below(90), type);
    test_decode_attention(4, 8, 4, 64, 300, Type::float32);
    for (const int bits : {0, 4, 8}) {
        test_transformer(Model(2, 192, 6, 2, 64, 320, bits), bits ? 2e-3 : FLOAT_ERROR);
        test_transformer(Model(1, 64, 4, 4, 16, 128, bits), bits ? 2e-3 : FLOAT_ERROR);
    }
    test_transformer(Model(2, 40, 3, 1, 24, 72, 0), FLOAT_ERROR);
    for (const auto& [rows, columns] : {std::pair{1, 8}, {7, 24}, {40, 192}, {35, 512}, {9, 1288}}) {
        test_multiply(Matrix(rows, columns, rows % 2));
        for (const bool scaled : {false, true}) {
            Matrix adapted(rows, columns, rows % 2);
            adapted.adapt({8, 0, 24}, scaled);
            test_multiply(adapted);
        }
    }
    for (const int bits : {4, 8}) {
        Matrix adapted(90, 256, true, bits, 128, true);
        adapted.adapt({64}, bits == 4);
        test_multiply(adapted);
        test_transformer(Model(2, 192, 6, 2, 64, 320, bits, 16), 2e-3);
    }
    for (const int64_t rank : {0, 8}) {
        test_prompts(Model(2, 192, 6, 2, 64, 320, 0, rank));
        test_many_rows(Model(2, 192, 6, 2, 64, 320, 0, rank));
        test_decode_patch(Model(2, 40, 3, 1, 24, 72, 0, rank));
    }
    test_transformer(Model(2, 40, 3, 1, 24, 72, 0, 64), FLOAT_ERROR);
    for (const bool layer_norms : {false, true}) {
        test_codec_stack(1, 3, 24, 80, layer_norms);
        test_codec_stack(9, 2, 40, 104, layer_norms);
        test_codec_stack(150, 2, 24, 64, layer_norms);
    }
    test_synthesis(60, 15, 1, 3, 2);
    test_synthesis(32, 8, 2, 4, 2);
    test_synthesis(28, 7, 2, 2, 2);
    test_synthesis(22, 22, 1, 7, 3);
    test_synthesis(2, 1, 1, 1, 1);
    for (const bool layer_norms : {false, true}) test_streams(layer_norms);
    for (const int64_t size : {1, 2, 63, 65, 1000}) test_sample(size, size % 2 ? 1 : 6);
    return test_gumbel();
}

}  // namespace

int main(int count, char** arguments) {
    const std::string wanted = count > 1 ? arguments[1] : "";
    omp_set_num_threads(3);
    const auto supported = supported_kernels();
    const Floats plain = results(*supported.back());
    int tested = 0;
    for (const Kernels* set : supported) {
        if (!wanted.empty() && wanted != set->name) continue;
        kernels = set;
        checked = failed = 0;
        const uint64_t checksum = test_set();
        // Noise as the reference in Python has it, mimo_fast/kernels/sample.py; tests/kernels/cpu/test_instruction_sets.py.
        report(checksum == CHECKSUM, "gumbel: the noise of this machine has the checksum %llx",
               static_cast<unsigned long long>(checksum));
        const Floats mine = results(*set);
        const bool exact = std::string(set->name) != "portable" && supported.front()->name != std::string("neon");
        if (exact) report(mine == results(*supported.front()), "quantized_matmul: bits differ between sets with FMA");
        double worst = 0;
        for (size_t i = 0; i < mine.size(); ++i) worst = std::max<double>(worst, std::fabs(mine[i] - plain[i]));
        report(worst <= 1e-5, "quantized_matmul: %g from the portable set", worst);
        std::printf("%s: %ld checks, %ld failed\n", set->name, checked, failed);
        if (failed) return 1;
        ++tested;
    }
    if (!tested) std::printf("%s is no set that this CPU runs\n", wanted.c_str());
    return tested ? 0 : 1;
}
