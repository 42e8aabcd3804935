#include <cstring>

#include "ops.h"

namespace lumina {

static bool runs(const char* isa) {
#ifdef LUMINA_X86
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
    if (!std::strcmp(isa, "avx512")) return &avx512::OPS;
    if (!std::strcmp(isa, "avx2")) return &avx2::OPS;
#endif
    return &portable::OPS;
}

const Ops& best_ops() {
    for (const char* isa : {"avx512", "avx2"})
        if (const Ops* ops = find_ops(isa)) return *ops;
    return portable::OPS;
}

}  // namespace lumina
