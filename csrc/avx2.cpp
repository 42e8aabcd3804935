#include "std.h"

#ifdef LUMINA_X86
#pragma GCC target("avx2,fma")
#define LUMINA_ISA avx2
#define LUMINA_AVX2
#include "all_ops.h"
#endif
