// How many threads a call may use.
#pragma once

#include <cstdint>

namespace mimo_fast {

// Keeps the operations of this thread, torch's too, on it until `widen`; such calls may be nested.
void narrow();
void widen();

// Threads that kernels may use that divide whole rows among them: as many as before `narrow`.
int available_threads();

// Threads among which to divide `rows` rows of `work` multiplications each: few rows are computed faster by one.
int threads_for(int64_t rows, int64_t work);

// Threads among which to divide `parts` parts of `work` multiplications in all.
int threads_of(int64_t parts, int64_t work);

}  // namespace mimo_fast
