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

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace onchip
