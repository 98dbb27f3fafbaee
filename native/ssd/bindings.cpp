// State space duality as Python calls it.
#include "bindings.hpp"

#include "ssd/problem.hpp"

ONCHIP_KERNELS(ssd)

namespace nb = nanobind;

namespace onchip::ssd {
namespace {

// (batch, T, heads, groups, dim, state_dim, chunk, softplus, threads); the range of a step; where packed sequences begin;
// x, dt, A, B, C, D, z, dt_bias, initial state, out, final state.
using Tensors = DescribedTensors<11>;

Problem problem(const std::array<int64_t, 9>& n, const std::array<double, 2>& limit, const std::vector<int64_t>& starts,
                const Tensors& tensors) {
    Problem p;
    for (int64_t b = 0; b < n[0]; ++b) {
        p.sequences.push_back(starts.empty() ? Sequence{b, 0, n[1], b}
                                             : Sequence{0, starts[b], starts[b + 1] - starts[b], b});
    }
    p.heads = n[2];
    p.group = p.heads / n[3];
    p.dim = n[4];
    p.state_dim = n[5];
    p.chunk = std::max<int64_t>(std::min(n[6], p.longest()), 1);
    p.softplus = n[7] != 0;
    p.threads = int(n[8]);
    p.low = limit[0];
    p.high = limit[1];
    Tensor* const targets[] = {&p.x,   &p.dt,         &p.A, &p.B, &p.C, &p.D, &p.z, &p.dt_bias, &p.initial_state,
                               &p.out, &p.final_state};
    assign(targets, tensors);
    return p;
}

void forward(const std::array<int64_t, 9>& sizes, const std::array<double, 2>& limit, const std::vector<int64_t>& starts,
             const Tensors& tensors) {
    const Problem p = problem(sizes, limit, starts, tensors);
    nb::gil_scoped_release release;
    kernels().forward(p);
}

// The gradients of out, final state, x, dt, B, C, z, initial state, A, D, dt_bias.
void backward(const std::array<int64_t, 9>& sizes, const std::array<double, 2>& limit, const std::vector<int64_t>& starts,
              const Tensors& tensors, const Tensors& gradients) {
    const Problem p = problem(sizes, limit, starts, tensors);
    Gradients g;
    Tensor* const targets[] = {&g.out, &g.final_state,   &g.x, &g.dt, &g.B,      &g.C,
                               &g.z,   &g.initial_state, &g.A, &g.D,  &g.dt_bias};
    assign(targets, gradients);
    nb::gil_scoped_release release;
    kernels().backward(p, g);
}

void step(const std::array<int64_t, 9>& sizes, const std::array<double, 2>& limit, const Tensors& tensors) {
    const Problem p = problem(sizes, limit, {}, tensors);
    nb::gil_scoped_release release;
    kernels().step(p);
}

}  // namespace

void bind(nb::module_& m) {
    m.def("ssd_forward", forward);
    m.def("ssd_backward", backward);
    m.def("ssd_step", step);
}

}  // namespace onchip::ssd
