#include <cstring>

#include "ops.h"

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lumina {

#ifdef LUMINA_X86
// Linux lets a process use tiles once it has asked: they are 8 KB more for it to save of each thread that uses them.
static bool has_tiles() {
#ifdef __linux__
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
           __builtin_cpu_supports("amx-bf16") && !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
#else
    return false;
#endif
}
#endif

static bool runs(const char* isa) {
#ifdef LUMINA_X86
    if (!std::strcmp(isa, "amx")) return runs("avx512") && has_tiles();
    // The integer and the bf16 dot product are both needed, so they count as one set.
    if (!std::strcmp(isa, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    if (!std::strcmp(isa, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return !std::strcmp(isa, "portable");
}

const Ops* find_ops(const char* isa) {
    if (!runs(isa)) return nullptr;
#ifdef LUMINA_X86
    if (!std::strcmp(isa, "amx")) return &amx::OPS;
    if (!std::strcmp(isa, "avx512")) return &avx512::OPS;
    if (!std::strcmp(isa, "avx2")) return &avx2::OPS;
#endif
    return &portable::OPS;
}

const Ops& best_ops() {
    for (const char* isa : {"amx", "avx512", "avx2"})
        if (const Ops* ops = find_ops(isa)) return *ops;
    return portable::OPS;
}

}  // namespace lumina
