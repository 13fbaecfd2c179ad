// Scratch memory of a kernel. Not std::vector: its functions would be compiled once a set under one name, and the linker
// would keep one copy for all, perhaps with instructions that the CPU lacks. This one has a name in each set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace mimo_fast::MIMO_FAST_SET {

template <class T>
class Buffer {
  public:
    // `size` zeros.
    explicit Buffer(int64_t size = 0) : values(new T[size]()), count(size) {}
    ~Buffer() { delete[] values; }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    // At least `size` values, of which nothing is known.
    void reserve(int64_t size) {
        if (size <= count) return;
        T* wider = new T[size]();
        delete[] values;
        values = wider;
        count = size;
    }

    T* data() { return values; }
    const T* data() const { return values; }
    int64_t size() const { return count; }
    T* begin() { return values; }
    T* end() { return values + count; }
    T& operator[](int64_t i) { return values[i]; }
    const T& operator[](int64_t i) const { return values[i]; }

  private:
    T* values;
    int64_t count;
};

// `size` values at the start of a cache line, of which nothing is known.
template <class T>
class Aligned {
  public:
    explicit Aligned(int64_t size) : values(new (std::align_val_t(64)) T[size]) {}
    ~Aligned() { operator delete[](values, std::align_val_t(64)); }
    Aligned(const Aligned&) = delete;
    Aligned& operator=(const Aligned&) = delete;

    T* data() { return values; }
    const T* data() const { return values; }
    T& operator[](int64_t i) { return values[i]; }
    const T& operator[](int64_t i) const { return values[i]; }

  private:
    T* values;
};

}  // namespace mimo_fast::MIMO_FAST_SET
