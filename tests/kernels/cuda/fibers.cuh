// Threads of a device as fibers of one thread of a CPU. Which of those that can go on does is drawn, so that each seed is
// another order; one goes on until it waits for others. `Manner` says from which of them it is drawn.
//
// What the device leaves open is made as bad as it may be: a copy to shared memory writes rubbish at once and the data only
// when it is waited for, and shared memory begins as NaNs.
#pragma once

#include <sys/mman.h>

#include <functional>
#include <new>
#include <vector>

#include <context.cuh>
#include <values.cuh>

constexpr int STUCK = 719;
constexpr uint32_t NANS = 0xffffffff;

inline uint32_t seed_of_fibers = 1;
extern "C" __attribute__((used)) inline void set_seed_of_fibers(uint32_t seed) { seed_of_fibers = seed; }

// splitmix64.
struct Draws {
    uint64_t state;

    uint64_t operator()() {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    uint32_t below(size_t limit) { return ((*this)() >> 32) * limit >> 32; }
};

// The stacks of a launch, which the next one uses again, whether or not the fibers of the last one ended.
struct Stacks {
    static constexpr size_t SIZE = 96 << 10, MOST = 4096;  // of one; so many are kept
    char* room = nullptr;
    size_t count = 0;

    Stacks() = default;
    Stacks(const Stacks&) = delete;
    ~Stacks() { give_back(); }

    void reserve(size_t wanted) {
        if (wanted <= count) return;
        give_back();
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* const got = mmap(nullptr, wanted * SIZE, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (got == MAP_FAILED) throw std::bad_alloc();
        room = static_cast<char*>(got), count = wanted;
    }
    void give_back() {
        if (count) munmap(room, count * SIZE);
        count = 0;
    }
    // Not all ends are at the same place of their pages, where they would push each other out of the CPU's caches.
    void begin(size_t i, Context& context, void (*body)()) {
        ::begin(context, room + i * SIZE, SIZE - i * 17 % 64 * 64, body);
    }
};

inline Stacks stacks;

struct Copy {
    void* to;
    const void* from;
    int bytes, group;
};

struct Warp;
struct Block;

struct Fiber {
    Context context;
    Block* block;
    Warp* warp;
    int thread;

    // Copies from `done` on have not been waited for; the next is of `group`.
    std::vector<Copy> copies;
    size_t done;
    int group;
};

// Its lanes, a bit each, and what these bring to a meeting and get from it. A lane has a place of its own for that, and
// comes to the next meeting when it has read it.
struct Warp {
    static constexpr uint32_t ALL = 0xffffffff;
    int first;  // fiber
    uint32_t ready = 0, arrived = 0;
    uint32_t words[32], results[32][4];
    int from[32];
    const uint4* rows[32];
    Operands operands;
};

// Threads that wait for each other.
struct Meeting {
    int members = 0;
    std::vector<Fiber*> waiting;
};

struct Block {
    dim3 index;
    std::vector<Warp> warps;
    std::vector<uint4> shared;
    Meeting all, named[16];
    bool vote = false, voted = false;  // whether a thread brought true to the barrier, and to the last one

    // With a line of 16 bytes behind its shared memory that nobody may write.
    Block(dim3 index, int threads, int bytes)
        : index(index), warps(threads / 32), shared((bytes + 31) / 16, uint4{NANS, NANS, NANS, NANS}) {
        all.members = threads;
    }
    bool wrote_beyond() const { return shared.back().x != NANS || shared.back().w != NANS; }
};

inline dim3 threadIdx, blockIdx, gridDim, blockDim;

// Whose turn it is: that of any warp; of one warp, mostly, as long as it can go on; of the one that was woken last, so
// that it comes far ahead. Its lane is always drawn.
enum class Manner { ANY, ONE, LAST };

// Those of one launch.
struct Fibers {
    std::vector<Fiber> all;
    std::vector<Warp*> ready;
    std::function<void()> body;
    Draws draw{seed_of_fibers};
    Context outside;
    Fiber* running = nullptr;
    int alive = 0;
    Manner manner = Manner::ANY;
    uint32_t until_event = 1;
    size_t turn = 0;       // in `ready`
    Warp* warp = nullptr;  // whose turn it was

    Fibers(int most, std::function<void()> body) : all(most), body(body) { stacks.reserve(most); }
    Fibers(const Fibers&) = delete;
    virtual ~Fibers() {
        if (all.size() > Stacks::MOST) stacks.give_back();
    }

    // Its threads, beside those of blocks that were added before and have not begun.
    void add(Block& block);

    // Until all have ended: 0; or none can go on: STUCK.
    int run();

    // The running one stops until it has been woken and drawn.
    void wait() {
        Fiber* const before = running;
        Fiber* const next = choose();
        if (next != before) change(before->context, next ? next->context : outside);
    }

    void wake(Warp& warp, uint32_t lanes) {
        if (!warp.ready) ready.push_back(&warp);
        warp.ready |= lanes;
    }
    void wake(const Fiber& fiber) { wake(*fiber.warp, 1u << fiber.thread % 32); }

    // Now and then; gives after how many steps again.
    virtual uint32_t event() {
        constexpr Manner MANNERS[] = {Manner::ANY, Manner::ONE, Manner::ONE, Manner::LAST};
        manner = MANNERS[draw.below(4)];
        return 1 + draw.below(4096);
    }

    // When none can go on; false if that stays so.
    virtual bool idle() { return false; }

    Fiber* choose() {
        while (ready.empty())
            if (!idle()) return nullptr;
        if (!--until_event) until_event = event();
        const uint64_t drawn = draw();
        if (manner == Manner::LAST)
            turn = ready.size() - 1;
        else if (manner == Manner::ANY || turn >= ready.size() || ready[turn] != warp || drawn % 64 == 0)
            turn = (drawn >> 32) * ready.size() >> 32;
        warp = ready[turn];
        // The first that can go on, from a lane on that is drawn.
        const int from = drawn >> 8 & 31;
        const int lane = (__builtin_ctz(warp->ready >> from | warp->ready << (-from & 31)) + from) & 31;
        warp->ready &= ~(1u << lane);
        if (!warp->ready) ready[turn] = ready.back(), ready.pop_back();
        running = &all[warp->first + lane];
        threadIdx.x = running->thread, blockIdx = running->block->index;
        return running;
    }
};

inline Fibers* fibers;

inline void body_of_fiber() {
    fibers->body();
    --fibers->alive;
    fibers->wait();
}

inline void Fibers::add(Block& block) {
    for (int i = 0; i < block.all.members; ++i, ++alive) {
        Fiber& fiber = all[alive];
        fiber.block = &block, fiber.warp = &block.warps[i / 32], fiber.thread = i;
        fiber.copies.clear(), fiber.done = 0, fiber.group = 0;
        stacks.begin(alive, fiber.context, body_of_fiber);
        if (i % 32 == 0) fiber.warp->first = alive;
        wake(fiber);
    }
}

inline int Fibers::run() {
    fibers = this;
    if (Fiber* const first = choose()) change(outside, first->context);
    return alive ? STUCK : 0;
}

inline Block& own_block() { return *fibers->running->block; }
inline Warp& own_warp() { return *fibers->running->warp; }
inline int own_lane() { return threadIdx.x % 32; }

// All members come here; the last wakes the others.
inline void meet(Meeting& meeting) {
    if (int(meeting.waiting.size()) + 1 < meeting.members) {
        meeting.waiting.push_back(fibers->running);
        fibers->wait();
    } else {
        for (const Fiber* fiber : meeting.waiting) fibers->wake(*fiber);
        meeting.waiting.clear();
    }
}

// All lanes come here; the last does `then`, wakes the others and goes on.
template <class Then>
void meet(Warp& warp, Then then) {
    const uint32_t own = 1u << own_lane();
    warp.arrived |= own;
    if (warp.arrived != Warp::ALL) return fibers->wait();
    then();
    warp.arrived = 0;
    fibers->wake(warp, Warp::ALL & ~own);
}

inline void __syncthreads() { meet(own_block().all); }
inline void sync_warp() { meet(own_warp(), [] {}); }
template <int THREADS>
void barrier(int id) {
    Meeting& meeting = own_block().named[id];
    meeting.members = THREADS;
    meet(meeting);
}
inline unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(own_block().shared.data()); }

inline float shfl(float value, int lane) {
    Warp& warp = own_warp();
    const int own = own_lane();
    std::memcpy(&warp.words[own], &value, 4);
    warp.from[own] = lane;
    meet(warp, [&] {
        for (int i = 0; i < 32; ++i) warp.results[i][0] = warp.words[warp.from[i]];
    });
    std::memcpy(&value, warp.results[own], 4);
    return value;
}

inline float shfl_xor(float value, int mask) { return shfl(value, own_lane() ^ mask); }

// For all lanes the same, of the words of all.
template <class Operation>
uint32_t of_warp(uint32_t value, Operation operation) {
    Warp& warp = own_warp();
    const int own = own_lane();
    warp.words[own] = value;
    meet(warp, [&] {
        uint32_t result = warp.words[0];
        for (int i = 1; i < 32; ++i) result = operation(result, warp.words[i]);
        for (auto& results : warp.results) results[0] = result;
    });
    return warp.results[own][0];
}

inline void ldmatrix_x4(uint32_t (&d)[4], const uint4* row) {
    Warp& warp = own_warp();
    const int own = own_lane();
    warp.rows[own] = row;
    meet(warp, [&] {
        for (int i = 0; i < 32; ++i)
            for (int lane = 0; lane < 4; ++lane) 
                std::memcpy(&warp.results[i % 8 * 4 + lane][i / 8], reinterpret_cast<const char*>(warp.rows[i]) + 4 * lane, 4);
    });
    std::memcpy(d, warp.results[own], sizeof d);
}

template <class T>
void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    Warp& warp = own_warp();
    Operands& all = warp.operands;
    const int own = own_lane();
    all.a[0][own] = a0, all.a[1][own] = a1, all.a[2][own] = a2, all.a[3][own] = a3;
    all.b[0][own] = b0, all.b[1][own] = b1;
    for (int i = 0; i < 4; ++i) all.d[i][own] = d[i];
    meet(warp, [&] { multiply<T>(all); });
    for (int i = 0; i < 4; ++i) d[i] = all.d[i][own];
}

template <int BYTES>
void copy(void* to, const void* from) {
    std::memset(to, 0xff, BYTES);
    Fiber& fiber = *fibers->running;
    fiber.copies.push_back({to, from, BYTES, fiber.group});
}
inline void cp_async_commit_group() { ++fibers->running->group; }

template <int LEFT>
void cp_async_wait_group() {
    Fiber& fiber = *fibers->running;
    for (; fiber.done < fiber.copies.size() && fiber.copies[fiber.done].group < fiber.group - LEFT; ++fiber.done) {
        const Copy& each = fiber.copies[fiber.done];
        std::memcpy(each.to, each.from, each.bytes);
    }
    if (2 * fiber.done < fiber.copies.size()) return;
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + fiber.done);
    fiber.done = 0;
}
