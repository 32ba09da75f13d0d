// The exported functions: each calls its form for the instruction set in use.
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../hpcsync_kernels.h"

#define KERNEL(result, name, parameters, arguments) result name parameters;
namespace plain {
#include "kernels.def"
}
#ifdef HPCSYNC_X86
namespace avx2 {
#include "kernels.def"
}
namespace avx512 {
#include "kernels.def"
}
#endif
#undef KERNEL

namespace {

enum Isa { PLAIN, AVX2, AVX512 };
const char *const NAMES[] = {"plain", "avx2", "avx512"};

bool supported(int isa) {
#ifdef HPCSYNC_X86
    __builtin_cpu_init();
    if (isa == AVX2) return __builtin_cpu_supports("avx2");
    if (isa == AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return isa == PLAIN;
}

int best() {
    int isa = AVX512;
    while (!supported(isa)) --isa;
    return isa;
}

std::atomic<int> in_use{best()};

}  // namespace

#ifdef HPCSYNC_X86
#define KERNEL(result, name, parameters, arguments)                      \
    extern "C" HPCSYNC_API result hpcsync_##name parameters {            \
        switch (in_use.load(std::memory_order_relaxed)) {                \
            case AVX512: return avx512::name arguments;                  \
            case AVX2: return avx2::name arguments;                      \
            default: return plain::name arguments;                       \
        }                                                                \
    }
#else
#define KERNEL(result, name, parameters, arguments) \
    extern "C" HPCSYNC_API result hpcsync_##name parameters { return plain::name arguments; }
#endif
#include "kernels.def"
#undef KERNEL

extern "C" HPCSYNC_API int hpcsync_abi_version(void) { return HPCSYNC_ABI_VERSION; }

extern "C" HPCSYNC_API const char *hpcsync_isa(void) { return NAMES[in_use.load()]; }

extern "C" HPCSYNC_API int hpcsync_use_isa(const char *name) {
    for (int isa = PLAIN; isa <= AVX512; ++isa)
        if (std::strcmp(name, NAMES[isa]) == 0 && supported(isa)) {
            in_use.store(isa);
            return 0;
        }
    return -1;
}
