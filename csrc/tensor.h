// Tensors as the ops see them, and the checks that come before any memory is touched.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace lumina {

enum class DType { f32, bf16, i8, u8, i32, i64, other };

struct bf16 {
    uint16_t bits;
};

// A view of a torch tensor: who holds it keeps it alive.
struct Tensor {
    static constexpr int MAX_DIM = 4;

    void* data;
    DType dtype;
    int ndim;
    int64_t shape[MAX_DIM];
    bool contiguous;

    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

constexpr int64_t ANY = -1;

// Throw std::invalid_argument, which is Python's ValueError, unless `tensor` is contiguous and has this dtype and shape.
void expect(const char* name, const Tensor& tensor, DType dtype, std::initializer_list<int64_t> shape);

// The same for every value of an int32 or int64 tensor of one dimension: at least `low`, below `high`.
void expect_range(const char* name, const Tensor& tensor, int64_t low, int64_t high);

// Throw std::invalid_argument with `message` unless `holds`.
void expect(bool holds, const char* message);

// Throw unless a tensor is fp32 or bf16; return its dtype.
DType expect_float(const char* name, const Tensor& tensor);

}  // namespace lumina
