// One call to a linear map of few rows as the kernels see it.
#pragma once

#include "common/tensor.hpp"

namespace onchip::linear {

constexpr int kMaxRows = 8;

// out = x weightᵀ + bias, for at most kMaxRows rows, all in one dtype: float32, bfloat16 or float16.
struct Problem {
    Rows x;
    Tensor weight;  // (out, in), contiguous along in
    Tensor bias;    // (out); optional
    Rows out;
    int threads;
};

// The kernel of one instruction set.
struct Kernels {
    void (*product)(const Problem&);
};

}  // namespace onchip::linear
