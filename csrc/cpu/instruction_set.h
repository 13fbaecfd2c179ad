// Which of the compiled sets of kernels this CPU runs.
#pragma once

#include <vector>

#include "kernels.h"

namespace mimo_fast {

// Sets whose instructions this CPU has, the fastest first; the last is `portable`.
std::vector<const Kernels*> supported_kernels();

// The fastest, or the one named by the environment variable MIMO_FAST_CPU.
// Throws std::invalid_argument where that names none of `supported_kernels`.
const Kernels& choose_kernels();

}  // namespace mimo_fast
