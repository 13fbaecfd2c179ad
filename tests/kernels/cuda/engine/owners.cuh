// Which block has written, and which has read, each byte of what only one block may touch within a launch.
#pragma once

#include <memory>
#include <unordered_map>

#include <values.cuh>

struct Owners {
    static constexpr uint16_t NOBODY = 0, SEVERAL = 0xffff;  // else a block's number and one more
    static constexpr uintptr_t PAGE = 4096;
    struct Byte { uint16_t writer = NOBODY, reader = NOBODY; };
    struct Page { Byte bytes[PAGE]; };

    std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
    uintptr_t last = 0;  // page
    Page* page = nullptr;
    bool violated = false;

    Byte& of(uintptr_t at) {
        if (!page || at / PAGE != last) {
            std::unique_ptr<Page>& found = pages[last = at / PAGE];
            if (!found) found = std::make_unique<Page>();
            page = found.get();
        }
        return page->bytes[at % PAGE];
    }

    void write(const void* to, size_t bytes, int block) {
        for (size_t i = 0; i < bytes; ++i) {
            Byte& byte = of(reinterpret_cast<uintptr_t>(to) + i);
            const auto other = [own = block + 1](uint16_t who) { return who != NOBODY && who != own; };
            violated |= other(byte.writer) || other(byte.reader);
            byte.writer = block + 1;
        }
    }

    // Several may read what nobody writes.
    void read(const void* from, size_t bytes, int block) {
        for (size_t i = 0; i < bytes; ++i) {
            Byte& byte = of(reinterpret_cast<uintptr_t>(from) + i);
            violated |= byte.writer != NOBODY && byte.writer != block + 1;
            byte.reader = byte.reader == NOBODY || byte.reader == block + 1 ? block + 1 : SEVERAL;
        }
    }
};
