// The op list, once for each instruction set. Contracts are those of kernels/reference.py; outputs come last, as tensors
// to write. Every op throws std::invalid_argument for tensors that do not fit, before it touches memory.
//
// norms: weight and bias of q, weight and bias of k.  pages: keys, their scales, values, their scales; scales are of
// one dimension and empty where keys and values have the dtype of the model, else those are int8.
#pragma once

#include "tensor.h"

namespace lumina {

struct Ops {
    const char* isa;
    void (*rms_norm)(const Tensor& x, const Tensor& weight, float eps, const Tensor& out, int threads);
    void (*add_rms_norm)(const Tensor& x, const Tensor& residual, const Tensor& weight, float eps, const Tensor& out,
                         const Tensor& sums, int threads);
    void (*rms_norm_add)(const Tensor& x, const Tensor& residual, const Tensor& weight, float eps, const Tensor& sums,
                         int threads);
    void (*qk_norm_rope)(const Tensor& qkv, const Tensor* norms, const Tensor& rope, const Tensor& positions,
                         const Tensor& slots, const Tensor* pages, const Tensor& q, int threads);
    void (*paged_attention)(const Tensor& q, const Tensor* pages, const Tensor& block_tables, const Tensor& cu_seqlens,
                            const Tensor& seq_lens, const Tensor& out, int threads);
    void (*silu_mul)(const Tensor& gate_up, const Tensor& out, int threads);
    void (*linear)(const Tensor& x, const Tensor& panels, const Tensor& scales, int bits, const Tensor& out,
                   int threads);
    void (*guided_sample)(const Tensor& logits, const Tensor& cond, const Tensor& uncond, const Tensor& token_ids,
                          const Tensor* controls, const Tensor* keys, const Tensor& out, int threads);

    // The floors of the machine: see floor.h.
    double (*read_gb_s)(const Tensor& buffer, int threads);
    double (*int8_gmac_s)(int threads);
    double (*bf16_gflop_s)(int threads);
};

namespace portable {
extern const Ops OPS;
}
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LUMINA_X86 1
namespace avx2 {
extern const Ops OPS;
}
namespace avx512 {
extern const Ops OPS;
}
namespace amx {  // avx512, and products of tiles
extern const Ops OPS;
}
#endif

// The ops of the widest set that this processor has.
const Ops& best_ops();

// The ops of a set by its name, null where this processor or this build does not have it.
const Ops* find_ops(const char* isa);

}  // namespace lumina
