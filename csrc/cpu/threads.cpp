#include "threads.h"

#include <omp.h>

namespace mimo_fast {
namespace {

// Rows and multiplications of a thread below which waking it costs more than it brings.
constexpr int64_t LEAST_ROWS = 4;
constexpr int64_t LEAST_WORK = 1 << 22;

thread_local int depth = 0;
thread_local int before = 0;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

void narrow() {
    if (depth++) return;
    before = omp_get_max_threads();
    omp_set_num_threads(1);
}

void widen() {
    if (!--depth) omp_set_num_threads(before);
}

int available_threads() {
    // A thread of a parallel region has no others.
    if (omp_in_parallel()) return 1;
    return depth ? before : omp_get_max_threads();
}

int threads_for(int64_t rows, int64_t work) { return threads_of(rows / LEAST_ROWS, rows * work); }

int threads_of(int64_t parts, int64_t work) {
    const int64_t wanted = least(parts, work / LEAST_WORK);
    return wanted < 2 ? 1 : int(least(wanted, available_threads()));
}

}  // namespace mimo_fast
