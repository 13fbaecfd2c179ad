// Stores of a block that other blocks do not see yet.
#pragma once

#include <algorithm>
#include <vector>

#include <values.cuh>

// Accesses that may meet are to one line of 16 bytes.
inline uintptr_t line_of(const void* at) { return reinterpret_cast<uintptr_t>(at) / 16; }

struct Store {
    unsigned char* to;
    unsigned char value[16];
    size_t bytes;
    uint64_t number, after;  // of the block's; those before `after` arrive first
};

struct Stores {
    static constexpr size_t MOST = 256;
    std::vector<Store> waiting;  // as they were made
    uint64_t made = 0;
    uint64_t lines = 0;  // which may be among them, a bit for each 64th

    void add(void* to, const void* value, size_t bytes, uint64_t after) {
        lines |= uint64_t(1) << line_of(to) % 64;
        Store& store = waiting.emplace_back(Store{static_cast<unsigned char*>(to), {}, bytes, made++, after});
        std::memcpy(store.value, value, bytes);
    }

    // What the block has stored is what it sees.
    void forward(const void* from, void* value, size_t bytes) const {
        if (!(lines >> line_of(from) % 64 & 1)) return;
        const auto* const begin = static_cast<const unsigned char*>(from);
        for (const Store& store : waiting) {
            const auto* const low = std::max<const unsigned char*>(begin, store.to);
            const auto* const high = std::min<const unsigned char*>(begin + bytes, store.to + store.bytes);
            if (low < high) std::memcpy(static_cast<unsigned char*>(value) + (low - begin), store.value + (low - store.to), high - low);
        }
    }

    // One of them, which arrives: number `which`, or one that has to come before it.
    Store take(size_t which) {
        const auto same = [line = line_of(waiting[which].to)](const Store& store) { return line_of(store.to) == line; };
        auto taken = std::find_if(waiting.begin(), waiting.end(), same);
        if (waiting.front().number < taken->after) taken = waiting.begin();
        const Store store = *taken;
        waiting.erase(taken);
        if (waiting.empty()) lines = 0;
        return store;
    }
};
