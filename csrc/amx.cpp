#include "std.h"

#ifdef LUMINA_X86
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,prefer-vector-width=512")
#define LUMINA_ISA amx
#define LUMINA_AVX512
#define LUMINA_AMX
#include "all_ops.h"
#endif
