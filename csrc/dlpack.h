// The part of DLPack 1's C exchange API that reads a tensor: how torch (from 2.10 on) shows one to code that is not
// linked to it. Names, order and sizes are the standard's: https://dmlc.github.io/dlpack/latest
#pragma once

#include <cstdint>

namespace lumina::dlpack {

constexpr int32_t CPU = 1;
enum Code : uint8_t { INT = 0, UINT = 1, FLOAT = 2, BFLOAT = 4 };

struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;  // strides: in elements
    uint64_t byte_offset;
};

struct ExchangeAPI {
    uint32_t major, minor;
    const ExchangeAPI* older;
    void* owning[3];  // to make tensors, and to share them: not used here
    // Fill in a view that lives as long as the object. Returns 0, or -1 with a Python error set.
    int (*view)(void* tensor, DLTensor* out);
    void* current_stream;
};

}  // namespace lumina::dlpack
