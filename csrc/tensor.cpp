#include "tensor.h"

#include <stdexcept>
#include <string>

namespace lumina {

static const char* name_of(DType dtype) {
    switch (dtype) {
        case DType::f32: return "float32";
        case DType::bf16: return "bfloat16";
        case DType::i8: return "int8";
        case DType::u8: return "uint8";
        case DType::i32: return "int32";
        case DType::i64: return "int64";
        default: return "a dtype that no op takes";
    }
}

template <class Sizes>
static std::string listed(const Sizes* sizes, int n) {
    std::string text = "[";
    for (int i = 0; i < n; ++i)
        text += (i ? ", " : "") + (sizes[i] == ANY ? std::string("any") : std::to_string(sizes[i]));
    return text + "]";
}

void expect(const char* name, const Tensor& tensor, DType dtype, std::initializer_list<int64_t> shape) {
    bool fits = tensor.dtype == dtype && tensor.ndim == static_cast<int>(shape.size());
    for (int i = 0; fits && i < tensor.ndim; ++i)
        fits = shape.begin()[i] == ANY || shape.begin()[i] == tensor.shape[i];
    if (fits && tensor.contiguous) return;
    throw std::invalid_argument(
        std::string(name) + " is " + name_of(tensor.dtype) + " " + listed(tensor.shape, tensor.ndim) +
        (tensor.contiguous ? "" : ", not contiguous") + "; expected contiguous " + name_of(dtype) + " " +
        listed(shape.begin(), static_cast<int>(shape.size())));
}

void expect_range(const char* name, const Tensor& tensor, int64_t low, int64_t high) {
    for (int64_t i = 0; i < tensor.shape[0]; ++i) {
        int64_t value = tensor.dtype == DType::i32 ? tensor.as<int32_t>()[i] : tensor.as<int64_t>()[i];
        if (value < low || value >= high)
            throw std::invalid_argument(std::string(name) + " holds " + std::to_string(value) + "; expected " +
                                        std::to_string(low) + " to " + std::to_string(high - 1));
    }
}

void expect(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

DType expect_float(const char* name, const Tensor& tensor) {
    if (tensor.dtype != DType::f32 && tensor.dtype != DType::bf16)
        throw std::invalid_argument(std::string(name) + " is " + name_of(tensor.dtype) +
                                    "; expected float32 or bfloat16");
    return tensor.dtype;
}

}  // namespace lumina
