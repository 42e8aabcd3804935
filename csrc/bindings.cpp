// lumina_rt._C: the only file that includes pybind11. It makes views of torch tensors, without being linked to torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "dlpack.h"
#include "ops.h"

namespace py = pybind11;
using lumina::DType;
using lumina::Tensor;

namespace {

const lumina::Ops* ops = &lumina::best_ops();

struct Torch {
    PyTypeObject* tensor;
    const lumina::dlpack::ExchangeAPI* api;
};

const Torch& torch() {
    static const Torch found = [] {
        py::object tensor = py::module_::import("torch").attr("Tensor");
        py::capsule api = tensor.attr("__dlpack_c_exchange_api__");
        auto* table = static_cast<const lumina::dlpack::ExchangeAPI*>(PyCapsule_GetPointer(api.ptr(), api.name()));
        if (!table || table->major != 1) throw std::runtime_error("this torch speaks another DLPack than version 1");
        return Torch{reinterpret_cast<PyTypeObject*>(tensor.ptr()), table};
    }();
    return found;
}

DType dtype_of(const lumina::dlpack::DLTensor& view) {
    switch (view.code << 8 | view.bits) {
        case lumina::dlpack::FLOAT << 8 | 32: return DType::f32;
        case lumina::dlpack::BFLOAT << 8 | 16: return DType::bf16;
        case lumina::dlpack::INT << 8 | 8: return DType::i8;
        case lumina::dlpack::UINT << 8 | 8: return DType::u8;
        case lumina::dlpack::INT << 8 | 32: return DType::i32;
        case lumina::dlpack::INT << 8 | 64: return DType::i64;
        default: return DType::other;
    }
}

bool is_contiguous(const lumina::dlpack::DLTensor& view) {
    int64_t expected = 1;
    bool dense = true;
    for (int i = view.ndim - 1; i >= 0; --i) {
        dense = dense && (view.shape[i] == 1 || !view.strides || view.strides[i] == expected);
        expected *= view.shape[i];
    }
    return dense || expected == 0;  // no element, no gap
}

}  // namespace

namespace pybind11::detail {

// A torch tensor on the CPU, of any layout.
template <>
struct type_caster<Tensor> {
    PYBIND11_TYPE_CASTER(Tensor, const_name("torch.Tensor"));

    bool load(handle source, bool) {
        if (!PyObject_TypeCheck(source.ptr(), torch().tensor)) return false;
        lumina::dlpack::DLTensor view;
        if (torch().api->view(source.ptr(), &view)) {
            PyErr_Clear();  // torch tells it with its own stack
            throw value_error("a tensor has no memory that can be read; expected one on the CPU");
        }
        if (view.device_type != lumina::dlpack::CPU)
            throw value_error("a tensor is on another device; expected one on the CPU");
        if (view.ndim > Tensor::MAX_DIM) throw value_error("a tensor has more than 4 dimensions");
        value.data = static_cast<char*>(view.data) + view.byte_offset;
        value.dtype = dtype_of(view);
        value.ndim = view.ndim;
        for (int i = 0; i < view.ndim; ++i) value.shape[i] = view.shape[i];
        value.contiguous = is_contiguous(view);
        return true;
    }
};

}  // namespace pybind11::detail

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ ops for the CPU; not linked to torch. lumina_rt.kernels.cpu gives them the signatures of the op list.";

    m.def("isa", [] { return ops->isa; }, "Name the instruction set in use: 'amx', 'avx512', 'avx2' or 'portable'.");
    m.def(
        "use_isa",
        [](const std::string& isa) {
            const lumina::Ops* found = lumina::find_ops(isa.c_str());
            if (!found) throw std::invalid_argument("isa is '" + isa + "'; expected one that this machine has");
            ops = found;
        },
        "Use another instruction set, for tests.");

    py::call_guard<py::gil_scoped_release> unlocked;
    m.def("rms_norm", [](Tensor x, Tensor weight, float eps, Tensor out, int threads) {
        ops->rms_norm(x, weight, eps, out, threads);
    }, unlocked);
    m.def("add_rms_norm", [](Tensor x, Tensor residual, Tensor weight, float eps, Tensor out, Tensor sums, int threads) {
        ops->add_rms_norm(x, residual, weight, eps, out, sums, threads);
    }, unlocked);
    m.def("rms_norm_add", [](Tensor x, Tensor residual, Tensor weight, float eps, Tensor sums, int threads) {
        ops->rms_norm_add(x, residual, weight, eps, sums, threads);
    }, unlocked);
    m.def("qk_norm_rope", [](Tensor qkv, std::array<Tensor, 4> norms, Tensor rope, Tensor positions, Tensor slots,
                             std::array<Tensor, 4> pages, Tensor q, int threads) {
        ops->qk_norm_rope(qkv, norms.data(), rope, positions, slots, pages.data(), q, threads);
    }, unlocked);
    m.def("paged_attention", [](Tensor q, std::array<Tensor, 4> pages, Tensor block_tables, Tensor cu_seqlens,
                                Tensor seq_lens, Tensor out, int threads) {
        ops->paged_attention(q, pages.data(), block_tables, cu_seqlens, seq_lens, out, threads);
    }, unlocked);
    m.def("silu_mul", [](Tensor gate_up, Tensor out, int threads) { ops->silu_mul(gate_up, out, threads); }, unlocked);
    m.def("linear", [](Tensor x, Tensor panels, Tensor scales, int bits, Tensor out, int threads) {
        ops->linear(x, panels, scales, bits, out, threads);
    }, unlocked);
    m.def("guided_sample", [](Tensor logits, Tensor cond, Tensor uncond, Tensor token_ids, std::array<Tensor, 5> controls,
                              std::array<Tensor, 3> keys, Tensor out, int threads) {
        ops->guided_sample(logits, cond, uncond, token_ids, controls.data(), keys.data(), out, threads);
    }, unlocked);

    m.def("read_gb_s", [](Tensor buffer, int threads) { return ops->read_gb_s(buffer, threads); }, unlocked,
          "Measure how fast memory is read. buffer: uint8 [n], far larger than the caches.");
    m.def("int8_gmac_s", [](int threads) { return ops->int8_gmac_s(threads); }, unlocked,
          "Measure billions of multiplications of bytes, each added to an int32, a second.");
    m.def("bf16_gflop_s", [](int threads) { return ops->bf16_gflop_s(threads); }, unlocked,
          "Measure billions of operations a second of bf16 products, each added to an fp32.");
}
