// One call to the root-mean-square norm as the kernel sees it.
#pragma once

#include "common/tensor.hpp"

namespace onchip::rms_norm {

// out = x / sqrt(mean(x²) + eps) · weight, for each row.
struct Problem {
    Rows x;
    Tensor weight;  // (size)
    double eps;
    Rows out;
    int threads;
};

// The kernel of one instruction set.
struct Kernels {
    void (*norm)(const Problem&);
};

}  // namespace onchip::rms_norm
