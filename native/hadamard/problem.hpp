// One call to the Walsh–Hadamard transform as the kernels see it.
#pragma once

#include <cstdint>

#include "common/tensor.hpp"

namespace onchip::hadamard {

// out = scale · ((x ∘ before) H) ∘ after, over the last dimension.
struct Problem {
    int64_t sizes[3];      // of the leading dimensions
    int64_t n;             // of the last: a power of two
    double scale;
    Tensor x;              // (sizes, n)
    Tensor before, after;  // (n,) in the type of the arithmetic, contiguous; optional
    Tensor out;            // as x, contiguous
    int threads;

    int64_t rows() const { return sizes[0] * sizes[1] * sizes[2]; }
};

// The kernel of one instruction set.
struct Kernels {
    void (*transform)(const Problem&);
};

}  // namespace onchip::hadamard
