// One call to ssd, or to its step, as the kernels see it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/tensor.hpp"

namespace onchip::ssd {

// A sequence of the batch: where its rows begin in packed tensors (0 otherwise) and how many there are.
struct Sequence {
    int64_t batch, start, length;
    int64_t index;  // of its state
};

struct Problem {
    std::vector<Sequence> sequences;
    int64_t heads, group, dim, state_dim;  // group: heads that share B and C
    int64_t chunk;                         // steps of time in a chunk
    bool softplus;
    double low, high;                      // what a step is clamped to
    Tensor x, dt, B, C;                    // (batch, time, heads, dim), (batch, time, heads), (batch, time, groups, state dim)
    Tensor A;                              // (heads) in the type of the arithmetic
    Tensor D, z, dt_bias;                  // (heads, dim) and (heads) in the type of the arithmetic; z as x; optional
    Tensor initial_state;                  // (sequences, heads, dim, state dim); optional
    Tensor out, final_state;               // as x and as initial_state, the state in the type of the arithmetic
    int threads;

    int64_t longest() const {
        int64_t length = 0;
        for (const Sequence& s : sequences) length = std::max(length, s.length);
        return length;
    }
    double operations() const {
        double rows = 0;
        for (const Sequence& s : sequences) rows += double(s.length);
        return 2 * rows * double(heads) * double(2 * dim * state_dim + chunk / 2 * dim);
    }
};

struct Gradients {
    Tensor out, final_state;        // of the outputs; final_state optional
    Tensor x, dt, B, C;             // of the inputs
    Tensor z, initial_state;        // optional
    Tensor A, D, dt_bias;           // (sequences, heads), D with dim after them: sums in double, zero before; D optional
};

// The kernels of one instruction set.
struct Kernels {
    void (*forward)(const Problem&);
    void (*backward)(const Problem&, const Gradients&);
    void (*step)(const Problem&);  // one step of time for each sequence
};

}  // namespace onchip::ssd
