// One call to the causal convolution as the kernels see it.
#pragma once

#include <cstdint>
#include <vector>

#include "common/tensor.hpp"

namespace onchip::causal_conv1d {

struct Sequence {
    int64_t batch, start, length, index;  // the row of a state is `index`
};

// out[t] = act(bias + Σ_w weight[:, w] ∘ x[t - (width - 1) + w]), with inputs before the first from `state`.
struct Problem {
    std::vector<Sequence> sequences;
    int64_t channels, width;
    bool silu;
    bool time_inner;  // out is contiguous along time, else along channels
    Tensor x;         // (batch, time, channel), best contiguous as out is
    Tensor weight;    // (channel, tap)
    Tensor bias;      // (channel); optional
    Tensor state;     // (sequence, width - 1, channel), of x's type; optional
    Tensor out;       // (batch, time, channel), of x's type
    int threads;
};

// Of the output, given, and of the rest, written.
struct Gradients {
    Tensor out;     // as out, and contiguous along the same dimension
    Tensor x;       // the same
    Tensor weight;  // (channel, tap)
    Tensor bias;    // (channel); optional
    Tensor state;   // as the state; optional
};

// The kernels of one instruction set.
struct Kernels {
    void (*forward)(const Problem&);
    void (*backward)(const Problem&, const Gradients&);
    void (*step)(const Problem&, const Tensor& state, int64_t rows);
};

}  // namespace onchip::causal_conv1d
