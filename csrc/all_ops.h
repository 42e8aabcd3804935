// All ops for one instruction set, LUMINA_ISA. Included once a set, behind the pragma that turns it on.
//
// LUMINA_AVX2, or LUMINA_AVX512 and perhaps LUMINA_AMX, says which set that is: g++ before 13 reads a whole file before
// it minds a pragma, so that __AVX2__ and its like are not defined behind one.

#define LUMINA_TEXT(name) #name
#define LUMINA_NAME(name) LUMINA_TEXT(name)

namespace lumina::LUMINA_ISA {

#include "simd.h"

#include "rms_norm.h"

#include "silu_mul.h"

#include "qk_norm_rope.h"

#include "paged_attention.h"

#include "linear.h"

#include "guided_sample.h"

#include "floor.h"

extern const Ops OPS = {
    LUMINA_NAME(LUMINA_ISA), rms_norm,  add_rms_norm, rms_norm_add, qk_norm_rope, paged_attention, silu_mul, linear,
    guided_sample,           read_gb_s, int8_gmac_s,  bf16_gflop_s,
};

}  // namespace lumina::LUMINA_ISA
