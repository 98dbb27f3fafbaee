// One call to the selective scan as the kernels see it.
#pragma once

#include <vector>

#include "common/tensor.hpp"

namespace onchip::selective_scan {

// `length` tokens from `start` on in a row of the batch; the first is token `row` of all, and `checkpoint` is the row of
// the state before it among the checkpoints.
struct Sequence {
    int64_t batch, start, length, index, row, checkpoint;
};

// h_t = exp(δ_t A) h_{t-1} + δ_t x_t B_t,   y_t = (C_t · h_t + D x_t) silu(z_t),   δ = softplus(dt + dt_bias)
struct Problem {
    std::vector<Sequence> sequences;
    int64_t tokens, channels, states, groups;
    int64_t chunk;  // tokens between two checkpoints
    bool softplus;
    int threads;
    Tensor x, dt;           // (batch, time, channels)
    Tensor A;               // (channels, states)
    Tensor B, C;            // (batch, time, groups, states)
    Tensor D, z, dt_bias;   // (channels,), as x, (channels,); each optional
    Tensor initial_state;   // (sequences, channels, states); optional
    Tensor out;             // as x
    Tensor final_state;     // (sequences, channels, states)
    Tensor checkpoints;     // (checkpoints, states, channels): the state before each chunk; optional in the forward pass
};

struct Gradients {
    Tensor out, final_state;     // of the results; the second is optional
    Tensor x, dt, z;             // contiguous, as are those below; z where the problem has one
    Tensor A;                    // (sequences, channels, states), to be summed over sequences
    Tensor D, dt_bias;           // (sequences, channels), the same
    Tensor initial_state;        // optional
    Tensor B, C;                 // (tokens, groups, states)
    Tensor B_partial, C_partial; // (blocks, tokens, states): the same of each block of channels, to be summed in order
};

// The kernels of one instruction set; `blocks` is in how many blocks the channels are taken.
struct Kernels {
    void (*forward)(const Problem&);
    void (*backward)(const Problem&, const Gradients&);
    void (*step)(const Problem&);  // x, dt, z, out, B and C without time; the state, final_state, is updated in place
    int64_t (*blocks)(int64_t channels, int64_t groups, bool wide);
};

}  // namespace onchip::selective_scan
