// Scratch memory of a kernel, on a boundary of a cache line, where no vector crosses one. Not std::vector: its functions
// would be compiled once a set under one name, and the linker would keep one copy for all, perhaps with instructions that
// the CPU lacks. This one has a name in each set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace mimo_fast::MIMO_FAST_SET {

template <class T>
class Buffer {
  public:
    // `size` zeros.
    explicit Buffer(int64_t size = 0) : values(make(size)), count(size) {}
    ~Buffer() { drop(); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    // At least `size` values, of which nothing is known.
    void reserve(int64_t size) {
        if (size <= count) return;
        T* wider = make(size);
        drop();
        values = wider;
        count = size;
    }

    T* data() { return values; }
    const T* data() const { return values; }
    int64_t size() const { return count; }
    T* begin() { return values; }
    T* end() { return values + count; }
    const T* begin() const { return values; }
    const T* end() const { return values + count; }
    T& operator[](int64_t i) { return values[i]; }
    const T& operator[](int64_t i) const { return values[i]; }

  private:
    static constexpr std::align_val_t LINE{64};

    T* values;
    int64_t count;

    static T* make(int64_t size) {
        T* made = static_cast<T*>(::operator new(size_t(size) * sizeof(T), LINE));
        for (int64_t i = 0; i < size; ++i) new (made + i) T();
        return made;
    }

    void drop() {
        for (int64_t i = 0; i < count; ++i) values[i].~T();
        ::operator delete(values, LINE);
    }
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
