// Draw first, from all ids that top-k keeps, then ask of the winner whether top-p keeps it; sample.py says why that is
// the same. Cumulative probabilities are summed in double.

#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "simd.h"

namespace mimo_fast::MIMO_FAST_SET {
namespace {

constexpr int64_t IDS = 64;
// All Gumbel noise lies in (-3.2, 22.9): an id whose score is further below the best one cannot win.
constexpr float SPAN = 26.5f;

// First output words of Philox 4x32-10 for counters (first + i, draw, slot, 0).
void philox(uint64_t key, uint32_t draw, uint32_t slot, uint32_t first, uint32_t (&words)[IDS]) {
    uint32_t x0[IDS], x1[IDS], x2[IDS], x3[IDS];
    for (int64_t i = 0; i < IDS; ++i) x0[i] = first + uint32_t(i), x1[i] = draw, x2[i] = slot, x3[i] = 0;
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (int64_t i = 0; i < IDS; ++i) {
            const uint64_t p0 = uint64_t(x0[i]) * 0xD2511F53u, p1 = uint64_t(x2[i]) * 0xCD9E8D57u;
            x0[i] = uint32_t(p1 >> 32) ^ x1[i] ^ k0;
            x1[i] = uint32_t(p1);
            x2[i] = uint32_t(p0 >> 32) ^ x3[i] ^ k1;
            x3[i] = uint32_t(p0);
        }
    std::memcpy(words, x0, sizeof words);
}

// int32 of the order of float32; -0.0 is 0.0.
int32_t ordered_bits(float x) {
    int32_t bits;
    x = x == 0 ? 0 : x;
    std::memcpy(&bits, &x, 4);
    return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

}  // namespace

void gumbel(int64_t seed, int64_t draw, uint32_t slot, uint32_t first, int64_t count, float* noise) {
    uint32_t words[IDS];
    for (int64_t start = 0; start < count; start += IDS) {
        philox(uint64_t(seed), uint32_t(draw), slot, first + uint32_t(start), words);
        const int64_t end = least(IDS, count - start);
        // 1 - w is exact, so that its logarithm is as good as log1p(-w).
        for (int64_t i = 0; i < end; ++i)
            noise[start + i] = -float(std::log(-std::log(1 - (double(words[i]) + 0.5) * 0x1p-32)));
    }
}

// Scores below the k-th largest become -inf; of ties at it, all are kept.
void Sampler::keep_top_k(int64_t size, int64_t k) {
    bits.reserve(size);
    for (int64_t i = 0; i < size; ++i) bits[i] = ordered_bits(scores[i]);
    // The comparison is a lambda of this namespace, so that each set has a function of its own: see buffer.h.
    std::nth_element(bits.begin(), bits.begin() + (k - 1), bits.begin() + size,
                     [](int32_t a, int32_t b) { return a > b; });
    const int32_t kth = bits[k - 1];
    for (int64_t i = 0; i < size; ++i)
        if (ordered_bits(scores[i]) < kth) scores[i] = -INFINITY;
}

int64_t Sampler::draw(
    const float* logits, int64_t size, const bool* banned, int64_t never, const SamplerRows& rows, int64_t row,
    uint32_t slot, uint32_t first
) {
    const auto allowed = [&](int64_t i) { return i != never && !(banned && banned[i]); };
    // A comparison with NaN is false.
    bool numbers = true;
    for (int64_t i = 0; i < size; ++i) numbers &= logits[i] < INFINITY;
    int64_t best = NOT_FINITE;
    float largest = -INFINITY;
    for (int64_t i = 0; i < size; ++i)
        if (logits[i] > largest && allowed(i)) best = i, largest = logits[i];
    if (!numbers || best == NOT_FINITE) return NOT_FINITE;
    if (rows.greedy[row]) return best;

    scores.reserve(size);
    noise.reserve(size);
    for (int64_t i = 0; i < size; ++i) scores[i] = logits[i] / rows.temperature[row];
    if (rows.top_k[row] > 0 && rows.top_k[row] < size) keep_top_k(size, rows.top_k[row]);
    const float lowest = scores[best] - SPAN;
    for (int64_t start = 0; start < size; start += IDS) {
        const int64_t count = least(IDS, size - start);
        bool wins = false;
        for (int64_t i = start; i < start + count; ++i) wins |= !(scores[i] < lowest);
        if (wins) gumbel(rows.seeds[row], rows.draws[row], slot, first + uint32_t(start), count, &noise[start]);
        else std::memset(&noise[start], 0, count * sizeof(float));
    }

    int64_t drawn = -1;
    const auto pick = [&](auto kept) {
        float winner = -INFINITY;
        drawn = -1;
        for (int64_t i = 0; i < size; ++i)
            if (scores[i] + noise[i] > winner && kept(i) && allowed(i)) drawn = i, winner = scores[i] + noise[i];
    };
    pick([](int64_t) { return true; });
    const float tail = rows.tail[row];
    if (drawn < 0 || tail <= 0) return drawn < 0 ? best : drawn;

    float top = scores[0];
    for (int64_t i = 1; i < size; ++i) top = scores[i] > top ? scores[i] : top;
    mass.reserve(size);
    double total = 0;
    for (int64_t i = 0; i < size; ++i) total += mass[i] = std::exp(scores[i] - top);
    while (drawn >= 0) {
        const float score = scores[drawn];
        const int64_t last = drawn;
        // In the order by (score, id).
        const auto above = [&](int64_t i) { return scores[i] > score || (scores[i] == score && i > last); };
        double below = 0;
        bool is_last = true;
        for (int64_t i = 0; i < size; ++i) {
            if (above(i)) is_last = false;
            else below += mass[i];
        }
        if (is_last || !(float(below / total) <= tail)) return drawn;
        pick(above);
    }
    return best;
}

void sample(const Logits& logits, const SamplerRows& settings, int64_t* ids) {
    Sampler sampler;
    for (int64_t r = 0; r < settings.rows; ++r) {
        const bool* banned = logits.banned ? logits.banned + r * logits.banned_stride : nullptr;
        ids[r] = sampler.draw(logits.values + r * logits.size, logits.size, banned, -1, settings, r, logits.slot, 0);
    }
}

}  // namespace mimo_fast::MIMO_FAST_SET
