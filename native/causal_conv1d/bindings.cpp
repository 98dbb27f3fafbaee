// The causal convolution as Python calls it.
#include "bindings.hpp"

#include "causal_conv1d/problem.hpp"

ONCHIP_KERNELS(causal_conv1d)

namespace nb = nanobind;

namespace onchip::causal_conv1d {
namespace {

// (batch, time, channels, width, silu, contiguous along time, threads); x, weight, bias, state and out.
using Sizes = std::array<int64_t, 7>;
using Tensors = DescribedTensors<5>;

Problem problem(const Sizes& n, const std::vector<int64_t>& starts, const Tensors& x) {
    Problem p{{},           n[2],         n[3],         n[4] != 0,    n[5] != 0, tensor(x[0]),
              tensor(x[1]), tensor(x[2]), tensor(x[3]), tensor(x[4]), int(n[6])};
    for (int64_t b = 0; b < n[0]; ++b) {
        if (starts.empty()) {
            p.sequences.push_back({b, 0, n[1], b});
        } else {
            p.sequences.push_back({0, starts[b], starts[b + 1] - starts[b], b});
        }
    }
    return p;
}

void forward(const Sizes& sizes, const std::vector<int64_t>& starts, const Tensors& tensors) {
    const Problem p = problem(sizes, starts, tensors);
    nb::gil_scoped_release release;
    kernels().forward(p);
}

// Gradients of out, and those of x, weight, bias and state, which are written.
void backward(const Sizes& sizes, const std::vector<int64_t>& starts, const Tensors& tensors, const Tensors& gradients) {
    const Problem p = problem(sizes, starts, tensors);
    const Gradients g{tensor(gradients[0]), tensor(gradients[1]), tensor(gradients[2]), tensor(gradients[3]),
                      tensor(gradients[4])};
    nb::gil_scoped_release release;
    kernels().backward(p, g);
}

// A state that may be longer than the filter, and is moved on by one: it and its number of rows.
void step(const Sizes& sizes, const Tensors& tensors, const Described& state, int64_t rows) {
    Problem p = problem(sizes, {}, tensors);
    const Tensor whole = tensor(state);
    p.state = whole;
    p.state.data = whole.at(0, rows - (p.width - 1), 0);
    nb::gil_scoped_release release;
    kernels().step(p, whole, rows);
}

}  // namespace

void bind(nb::module_& m) {
    m.def("causal_conv1d_forward", forward);
    m.def("causal_conv1d_backward", backward);
    m.def("causal_conv1d_step", step);
}

}  // namespace onchip::causal_conv1d
