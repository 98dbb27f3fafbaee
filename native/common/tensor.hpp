// What the kernels know of a tensor: an address, an element type and strides. Free of any instruction set.
#pragma once

#include <cstdint>

namespace onchip {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3, boolean = 4 };

inline int64_t item_size(DType dtype) {
    switch (dtype) {
        case DType::float64: return 8;
        case DType::float32: return 4;
        case DType::boolean: return 1;
        default: return 2;
    }
}

// Four dimensions, strides in elements. The dimensions' meaning is the user's.
struct Tensor {
    char* data = nullptr;
    DType dtype = DType::float32;
    int64_t strides[4] = {0, 0, 0, 0};

    explicit operator bool() const { return data != nullptr; }
    char* at(int64_t a, int64_t b, int64_t c, int64_t d = 0) const {
        return data + item_size(dtype) * (a * strides[0] + b * strides[1] + c * strides[2] + d * strides[3]);
    }
};

// A tensor seen as rows along its last dimension, in the order of up to three dimensions before it.
struct Rows {
    int64_t sizes[3] = {0, 0, 0};  // of those before
    int64_t size = 0;              // of the last
    Tensor tensor;                 // (sizes, size)

    int64_t count() const { return sizes[0] * sizes[1] * sizes[2]; }
    int64_t stride() const { return tensor.strides[3]; }
    char* at(int64_t row) const { return tensor.at(row / sizes[2] / sizes[1], row / sizes[2] % sizes[1], row % sizes[2]); }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace onchip
