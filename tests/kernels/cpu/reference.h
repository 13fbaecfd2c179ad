// What the kernels compute, in scalar double precision, written from their formulas and not from their code.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "kernels.h"

namespace reference {

using namespace mimo_fast;
using Doubles = std::vector<double>;
using Floats = std::vector<float>;

inline std::mt19937 generator(1);

inline Floats gaussian(int64_t count, double scale = 1, double mean = 0) {
    std::normal_distribution<double> normal(mean, scale);
    Floats values(count);
    for (float& value : values) value = float(normal(generator));
    return values;
}

inline int64_t below(int64_t limit) { return int64_t(generator() % uint64_t(limit)); }

inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float from_bfloat16(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

// A whole number of at most 8 bits or a quarter of one, as float16.
inline uint16_t to_float16(float value) {
    if (value == 0) return 0;
    int exponent;
    const float fraction = std::frexp(std::fabs(value), &exponent);  // [0.5, 1)
    return uint16_t((value < 0 ? 0x8000 : 0) | (exponent + 14) << 10 | int(fraction * 2048 - 1024));
}

// Values of a type as a kernel reads them, and what they are.
struct Stored {
    Type type;
    Floats wide;
    std::vector<uint16_t> narrow;

    Stored(Type type, const Floats& values) : type(type), wide(values) {
        if (type == Type::float32) return;
        for (float& value : wide) {
            narrow.push_back(to_bfloat16(value));
            value = from_bfloat16(narrow.back());
        }
    }
    void* data() { return type == Type::float32 ? static_cast<void*>(wide.data()) : narrow.data(); }
    // What a kernel left at `data()`.
    float at(int64_t i) const { return type == Type::float32 ? wide[i] : from_bfloat16(narrow[i]); }
    Doubles part(int64_t first, int64_t count) const {
        Doubles values;
        for (int64_t i = 0; i < count; ++i) values.push_back(at(first + i));
        return values;
    }
};

// A random matrix with its bias, dense in two blocks of rows or quantized, and what it stands for.
struct Matrix {
    int64_t rows, columns;
    Doubles dense, bias;
    Floats weights, biases;
    std::vector<uint32_t> words;
    std::vector<uint16_t> scales, zeros;
    std::deque<Floats> added;  // A and B of each block of rows
    Floats factor, last_bias;
    Linear linear;

    Matrix(int64_t rows, int64_t columns, bool has_bias) : rows(rows), columns(columns) {
        weights = gaussian(rows * columns, 1 / std::sqrt(double(columns)));
        dense.assign(weights.begin(), weights.end());
        add_bias(has_bias);
        linear.rows = rows;
        linear.columns = columns;
        const int64_t first = rows / 3;
        const float* b = has_bias ? biases.data() : nullptr;
        if (first) linear.blocks.push_back({weights.data(), b, first});
        linear.blocks.push_back({weights.data() + first * columns, b ? b + first : nullptr, rows - first});
    }

    Matrix(int64_t rows, int64_t columns, bool has_bias, int bits, int64_t group, bool has_zeros)
        : rows(rows), columns(columns), dense(rows * columns), words(rows * columns * bits / 32) {
        const int64_t block = std::gcd<int64_t>(128, group), planes = 32 / bits, width = block / planes;
        const double step = 1 / std::sqrt(double(columns)) / double(1 << (bits - 1));
        const Floats steps = gaussian(rows * columns / group, 0.1 * step, step);
        for (int64_t i = 0; i < rows * columns; ++i) {
            const int64_t n = i / columns, c = i % columns, at = i / group;
            if (i % group == 0) {
                scales.push_back(to_bfloat16(steps[at]));
                zeros.push_back(to_float16(float(below(32)) / 4 - 4));
            }
            const uint32_t q = uint32_t(below(int64_t(1) << bits));
            const int64_t word = c / block * width + c % block % width, plane = c % block / width;
            words[n * (columns * bits / 32) + word] |= q << (bits * plane);
            const double zero = has_zeros ? zero_of(zeros.back()) : 0;
            dense[i] = from_bfloat16(scales[at]) * (double(q) - (1 << (bits - 1)) - zero);
        }
        add_bias(has_bias);
        linear.rows = rows;
        linear.columns = columns;
        linear.quantized_bias = has_bias ? biases.data() : nullptr;
        linear.quantized = {reinterpret_cast<const uint8_t*>(words.data()), scales.data(),
                            has_zeros ? zeros.data() : nullptr, bits, int(block), group, rows, columns};
    }
    Matrix(const Matrix&) = delete;

    // Adapters of these ranks beside as many blocks of rows, 0 for a block without one, and the factor and bias after them.
    void adapt(const std::vector<int64_t>& ranks, bool scaled) {
        const int64_t count = int64_t(ranks.size());
        for (int64_t i = 0; i < count; ++i) {
            const int64_t first = rows * i / count, own = rows * (i + 1) / count - first, rank = ranks[i];
            if (!rank || !own) continue;
            const Floats& a = added.emplace_back(gaussian(rank * columns, 1 / std::sqrt(double(columns))));
            const Floats& b = added.emplace_back(gaussian(own * rank, 1 / std::sqrt(double(rank))));
            linear.added.push_back({a.data(), b.data(), rank, first, own});
            for (int64_t n = 0; n < own; ++n)
                for (int64_t k = 0; k < columns; ++k)
                    for (int64_t r = 0; r < rank; ++r)
                        dense[(first + n) * columns + k] += double(b[n * rank + r]) * a[r * columns + k];
        }
        if (!scaled) return;
        factor = gaussian(rows, 0.2, 1);
        last_bias = gaussian(rows);
        linear.factor = factor.data();
        linear.last_bias = last_bias.data();
        for (int64_t n = 0; n < rows; ++n) {
            for (int64_t k = 0; k < columns; ++k) dense[n * columns + k] *= factor[n];
            bias[n] = bias[n] * factor[n] + last_bias[n];
        }
    }

    void add_bias(bool has_bias) {
        biases = gaussian(has_bias ? rows : 0);
        bias.assign(rows, 0);
        std::copy(biases.begin(), biases.end(), bias.begin());
    }

    static double zero_of(uint16_t bits) {
        if (!(bits & 0x7FFF)) return 0;
        return (bits & 0x8000 ? -1 : 1) * std::ldexp(1024 + (bits & 1023), (bits >> 10 & 31) - 25);
    }

    Doubles multiply(const Doubles& x) const {
        const int64_t M = int64_t(x.size()) / columns;
        Doubles y(M * rows);
        for (int64_t m = 0; m < M; ++m)
            for (int64_t n = 0; n < rows; ++n)
                y[m * rows + n] = bias[n] + std::inner_product(&x[m * columns], &x[m * columns] + columns,
                                                               &dense[n * columns], 0.0);
        return y;
    }
};

inline Doubles wide(const Floats& x) { return Doubles(x.begin(), x.end()); }

inline Doubles rms_norm(const Doubles& x, const Floats& weight, double eps) {
    const int64_t K = int64_t(weight.size());
    Doubles y(x);
    for (size_t at = 0; at < x.size(); at += K) {
        const double squares = std::inner_product(&x[at], &x[at] + K, &x[at], 0.0);
        for (int64_t k = 0; k < K; ++k) y[at + k] *= weight[k] / std::sqrt(squares / double(K) + eps);
    }
    return y;
}

inline Doubles layer_norm(const Doubles& x, const Floats& weight, const Floats& bias, double eps) {
    const int64_t K = int64_t(weight.size());
    Doubles y(x);
    for (size_t at = 0; at < x.size(); at += K) {
        const double mean = std::accumulate(&x[at], &x[at] + K, 0.0) / double(K);
        double squares = 0;
        for (int64_t k = 0; k < K; ++k) squares += (x[at + k] - mean) * (x[at + k] - mean);
        for (int64_t k = 0; k < K; ++k)
            y[at + k] = (x[at + k] - mean) / std::sqrt(squares / double(K) + eps) * weight[k] + bias[k];
    }
    return y;
}

// silu(first half) * second half of each row.
inline Doubles swiglu(const Doubles& x, int64_t width) {
    Doubles y;
    for (size_t at = 0; at < x.size(); at += width)
        for (int64_t i = 0; i < width / 2; ++i)
            y.push_back(x[at + i] / (1 + std::exp(-x[at + i])) * x[at + width / 2 + i]);
    return y;
}

// A head rotated by cosines and sines of angles [head_dim / 2].
inline Doubles rotated(const double* x, int64_t head_dim, const float* cosines, const float* sines) {
    const int64_t half = head_dim / 2;
    Doubles y(head_dim);
    for (int64_t i = 0; i < half; ++i) {
        y[i] = x[i] * cosines[i] - x[half + i] * sines[i];
        y[half + i] = x[half + i] * cosines[i] + x[i] * sines[i];
    }
    return y;
}

// Softmax attention of q over keys and values, heads one by one.
inline Doubles attend(const Doubles& q, const std::vector<Doubles>& keys, const std::vector<Doubles>& values) {
    Doubles weights, y(q.size());
    for (const Doubles& key : keys)
        weights.push_back(std::inner_product(q.begin(), q.end(), key.begin(), 0.0) / std::sqrt(double(q.size())));
    const double largest = *std::max_element(weights.begin(), weights.end());
    double total = 0;
    for (double& weight : weights) total += weight = std::exp(weight - largest);
    for (size_t j = 0; j < keys.size(); ++j)
        for (size_t i = 0; i < q.size(); ++i) y[i] += weights[j] / total * values[j][i];
    return y;
}

// Cosines and sines [2, positions, half].
inline Floats rotations(int64_t positions, int64_t half) {
    Floats table(2 * positions * half);
    for (int64_t p = 0; p < positions; ++p)
        for (int64_t i = 0; i < half; ++i) {
            const double angle = double(p) * std::pow(100.0, -double(i) / double(half));
            table[p * half + i] = float(std::cos(angle));
            table[(positions + p) * half + i] = float(std::sin(angle));
        }
    return table;
}

// A random small transformer, dense or quantized, with adapters of a rank beside its matrices or none.
struct Model {
    std::deque<Matrix> matrices;  // qkv, out, gate_up and down of each layer
    std::deque<Floats> norms;     // two a layer, and the last
    Floats table;
    Transformer native;

    Model(
        int layers, int64_t dim, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t ffn, int bits,
        int64_t rank = 0
    ) {
        const int64_t positions = 12;
        table = rotations(positions, head_dim / 2);
        native = {{}, nullptr, 1e-5f, table.data(), positions, dim, heads, kv_heads, head_dim};
        const auto matrix = [&](int64_t rows, int64_t columns, bool bias) -> const Linear& {
            if (bits) matrices.emplace_back(rows, columns, bias, bits, columns % 128 ? 64 : 128, true);
            else matrices.emplace_back(rows, columns, bias);
            // Of qkv's three blocks, q has none.
            if (rank) matrices.back().adapt({bias ? 0 : rank, rank, rank}, bias);
            return matrices.back().linear;
        };
        for (int i = 0; i < layers; ++i) {
            norms.push_back(gaussian(dim, 0.1, 1));
            norms.push_back(gaussian(dim, 0.1, 1));
            Layer layer = {norms[2 * i].data(), matrix(native.qkv_width(), dim, true), {}, norms[2 * i + 1].data(),
                           {}, {}};
            layer.out = matrix(dim, heads * head_dim, false);
            layer.gate_up = matrix(2 * ffn, dim, false);
            layer.down = matrix(dim, ffn, false);
            native.layers.push_back(layer);
        }
        norms.push_back(gaussian(dim, 0.1, 1));
        native.norm = norms.back().data();
    }

    // x [T, dim], one sequence -> normed hidden states.
    Doubles run(Doubles x, bool causal) const {
        const Transformer& t = native;
        const int64_t T = int64_t(x.size()) / t.dim, dh = t.head_dim, width = t.qkv_width(), half = dh / 2;
        for (size_t i = 0; i < t.layers.size(); ++i) {
            const Doubles qkv = matrices[4 * i].multiply(rms_norm(x, norms[2 * i], t.eps));
            Doubles attended;
            const auto head = [&](int64_t m, int64_t h) {
                return rotated(&qkv[m * width + h * dh], dh, &table[m * half], &table[(t.positions + m) * half]);
            };
            for (int64_t m = 0; m < T; ++m)
                for (int64_t h = 0; h < t.heads; ++h) {
                    std::vector<Doubles> keys, values;
                    for (int64_t j = 0; j < (causal ? m + 1 : T); ++j) {
                        const int64_t g = t.heads + h * t.kv_heads / t.heads;
                        keys.push_back(head(j, g));
                        const double* value = &qkv[j * width + (g + t.kv_heads) * dh];
                        values.emplace_back(value, value + dh);
                    }
                    const Doubles y = attend(head(m, h), keys, values);
                    attended.insert(attended.end(), y.begin(), y.end());
                }
            add(x, matrices[4 * i + 1].multiply(attended));
            const Matrix& gate_up = matrices[4 * i + 2];
            const Doubles gated = swiglu(gate_up.multiply(rms_norm(x, norms[2 * i + 1], t.eps)), gate_up.rows);
            add(x, matrices[4 * i + 3].multiply(gated));
        }
        return rms_norm(x, norms.back(), t.eps);
    }

    static void add(Doubles& x, const Doubles& y) {
        for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
    }
};

// Reference of sampling, by a sort; noise [size].
inline int64_t draw(
    const float* logits, int64_t size, const std::function<bool(int64_t)>& allowed, float temperature, int64_t top_k,
    float tail, bool greedy, const Floats& noise
) {
    const auto largest = [&](const std::function<float(int64_t)>& score) {
        int64_t best = -1;
        for (int64_t i = 0; i < size; ++i)
            if (allowed(i) && score(i) > -INFINITY && (best < 0 || score(i) > score(best))) best = i;
        return best;
    };
    const int64_t best = largest([&](int64_t i) { return logits[i]; });
    if (greedy) return best;
    Floats scores(size);
    for (int64_t i = 0; i < size; ++i) scores[i] = logits[i] / temperature;
    if (top_k > 0 && top_k < size) {
        Floats sorted(scores);
        std::sort(sorted.begin(), sorted.end(), std::greater<>());
        for (float& score : scores)
            if (score < sorted[top_k - 1]) score = -INFINITY;
    }
    std::vector<int64_t> order(size);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return scores[a] < scores[b]; });
    double total = 0, mass = 0;
    for (float score : scores) total += std::exp(double(score) - scores[order.back()]);
    for (int64_t i = 0; i < size - 1; ++i) {
        const int64_t id = order[i];
        mass += std::exp(double(scores[id]) - scores[order.back()]);
        if (tail > 0 && mass / total <= tail) scores[id] = -INFINITY;
        else break;
    }
    const int64_t drawn = largest([&](int64_t i) { return scores[i] + noise[i]; });
    return drawn < 0 ? best : drawn;
}

}  // namespace reference
