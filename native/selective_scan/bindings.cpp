// The selective scan as Python calls it.
#include "bindings.hpp"

#include "selective_scan/problem.hpp"

ONCHIP_KERNELS(selective_scan)

namespace nb = nanobind;

namespace onchip::selective_scan {
namespace {

// (batch, time, channels, states, groups, chunk, softplus, threads), as integers.
using Sizes = std::array<int64_t, 8>;
using Tensors = DescribedTensors<12>;

// `starts` are the boundaries of packed sequences, empty where each row of the batch is one.
Problem problem(const Sizes& n, const std::vector<int64_t>& starts, const Tensors& tensors) {
    Problem p;
    const int64_t count = starts.empty() ? n[0] : int64_t(starts.size()) - 1;
    int64_t checkpoint = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = starts.empty() ? i * n[1] : starts[i], length = starts.empty() ? n[1] : starts[i + 1] - row;
        p.sequences.push_back({starts.empty() ? i : 0, starts.empty() ? 0 : row, length, i, row, checkpoint});
        checkpoint += ceil_div(length, n[5]);
    }
    p.tokens = n[0] * n[1];
    p.channels = n[2];
    p.states = n[3];
    p.groups = n[4];
    p.chunk = n[5];
    p.softplus = n[6] != 0;
    p.threads = int(n[7]);
    Tensor* const targets[] = {&p.x,   &p.dt,          &p.A,          &p.B, &p.C, &p.D, &p.z, &p.dt_bias, &p.initial_state,
                               &p.out, &p.final_state, &p.checkpoints};
    assign(targets, tensors);
    return p;
}

void forward(const Sizes& sizes, const std::vector<int64_t>& starts, const Tensors& tensors) {
    const Problem p = problem(sizes, starts, tensors);
    nb::gil_scoped_release release;
    kernels().forward(p);
}

void backward(const Sizes& sizes, const std::vector<int64_t>& starts, const Tensors& tensors,
              const DescribedTensors<13>& gradients) {
    const Problem p = problem(sizes, starts, tensors);
    Gradients g;
    Tensor* const targets[] = {&g.out,     &g.final_state,   &g.x,         &g.dt,       &g.A, &g.B, &g.C, &g.D, &g.z,
                               &g.dt_bias, &g.initial_state, &g.B_partial, &g.C_partial};
    assign(targets, gradients);
    nb::gil_scoped_release release;
    kernels().backward(p, g);
}

// The first size is the number of rows, and the second 1: the tensors have no time.
void step(const Sizes& sizes, const Tensors& tensors) {
    const Problem p = problem(sizes, {}, tensors);
    nb::gil_scoped_release release;
    kernels().step(p);
}

}  // namespace

void bind(nb::module_& m) {
    m.def("selective_scan_forward", forward);
    m.def("selective_scan_backward", backward);
    m.def("selective_scan_step", step);
    m.def("selective_scan_blocks",
          [](int64_t channels, int64_t groups, bool wide) { return kernels().blocks(channels, groups, wide); });
}

}  // namespace onchip::selective_scan
