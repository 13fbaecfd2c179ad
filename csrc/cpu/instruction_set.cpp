#include "instruction_set.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__aarch64__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMD
#define HWCAP_ASIMD (1 << 1)
#endif
#endif

namespace mimo_fast {

std::vector<const Kernels*> supported_kernels() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    // These ask the operating system too, which must save the wider registers.
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512vnni");
    if (has_avx512) found.push_back(&avx512::kernels);
    if (has_avx2) found.push_back(&avx2::kernels);
#elif defined(__aarch64__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMD) found.push_back(&neon::kernels);
#endif
    found.push_back(&portable::kernels);
    return found;
}

const Kernels& choose_kernels() {
    const std::vector<const Kernels*> supported = supported_kernels();
    const char* wanted = std::getenv("MIMO_FAST_CPU");
    if (!wanted || !*wanted) return *supported.front();
    std::string names;
    for (const Kernels* each : supported) {
        if (std::string(wanted) == each->name) return *each;
        names += names.empty() ? each->name : std::string(", ") + each->name;
    }
    throw std::invalid_argument(
        "MIMO_FAST_CPU=" + std::string(wanted) + ": this CPU runs " + names + "; unset it for the fastest");
}

}  // namespace mimo_fast
