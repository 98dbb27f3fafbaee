// The steps of decoding, and what is between them, given tensors: a call that fits in every respect runs, and is True;
// for another nothing is done, and it is False. Python then finds out what it was that did not fit. A model makes dozens
// of these calls for a token.
#include "bindings.hpp"
#include "causal_conv1d/problem.hpp"
#include "linear/problem.hpp"
#include "rms_norm/problem.hpp"
#include "selective_scan/problem.hpp"
#include "ssd/problem.hpp"
#include "torch_tensor.hpp"

#include <cmath>
#include <limits>

ONCHIP_KERNELS(causal_conv1d)
ONCHIP_KERNELS(linear)
ONCHIP_KERNELS(rms_norm)
ONCHIP_KERNELS(selective_scan)
ONCHIP_KERNELS(ssd)

namespace nb = nanobind;

namespace onchip {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

DType wide(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

// What a state may be in.
bool carries(const Argument& state, const Argument& x) {
    return state.dtype() == wide(x.dtype()) || state.dtype() == x.dtype();
}

bool is_flag(nb::handle flag) { return PyBool_Check(flag.ptr()); }

// (low, high), or None for all.
bool read_range(nb::handle range, double& low, double& high) {
    low = -kInfinity;
    high = kInfinity;
    if (range.is_none()) return true;
    if (!PyTuple_CheckExact(range.ptr()) || PyTuple_GET_SIZE(range.ptr()) != 2) return false;
    PyObject *const first = PyTuple_GET_ITEM(range.ptr(), 0), *const second = PyTuple_GET_ITEM(range.ptr(), 1);
    if (!PyFloat_CheckExact(first) || !PyFloat_CheckExact(second)) return false;
    low = PyFloat_AS_DOUBLE(first);
    high = PyFloat_AS_DOUBLE(second);
    return low <= high && low != kInfinity && high != -kInfinity;
}

bool try_causal_conv1d_step(nb::handle x_t, nb::handle state, nb::handle weight, nb::handle bias, bool silu, nb::handle y,
                            int threads) {
    const Argument x(x_t), h(state), w(weight), b(bias), out(y);
    if (!x.fits({kAnySize, kAnySize})) return false;
    const int64_t batch = x.size(0), channels = x.size(1);
    if (!w.fits({channels, kAnySize}) || !b.absent_or_fits({channels}) || !out.fits({batch, channels})) return false;
    const int64_t width = w.size(1);
    if (!h.fits({batch, width - 1, channels}) || h.dtype() != x.dtype() || out.dtype() != x.dtype()) return false;
    if (h.expanded()) return false;
    const Tensor rows = h.as({0, 1, 2});
    causal_conv1d::Problem p{{}, channels, width, silu, false, x.as({0, -1, 1}), w.as({0, 1}), b.as({0}), rows,
                             out.as({0, -1, 1}), threads};
    for (int64_t i = 0; i < batch; ++i) p.sequences.push_back({i, 0, 1, i});
    nb::gil_scoped_release release;
    causal_conv1d::kernels().step(p, rows, width - 1);
    return true;
}

bool same_count(const Rows& x, const Rows& y) {
    return x.sizes[0] == y.sizes[0] && x.sizes[1] == y.sizes[1] && x.sizes[2] == y.sizes[2];
}

bool try_linear(nb::handle input, nb::handle matrix, nb::handle offset, nb::handle y, int threads) {
    const Argument x(input), weight(matrix), bias(offset), out(y);
    const linear::Problem p{x.rows(), weight.as({0, 1}), bias.as({0}), out.rows(), threads};
    if (!weight.fits({p.out.size, p.x.size}) || !bias.absent_or_fits({p.out.size}) || !same_count(p.x, p.out)) return false;
    if (p.x.count() > linear::kMaxRows || x.dtype() == DType::float64 || p.weight.strides[1] != 1) return false;
    if (weight.dtype() != x.dtype() || out.dtype() != x.dtype() || (!bias.absent() && bias.dtype() != x.dtype())) return false;
    nb::gil_scoped_release release;
    linear::kernels().product(p);
    return true;
}

bool try_rms_norm(nb::handle input, nb::handle gain, double eps, nb::handle y, int threads) {
    const Argument x(input), weight(gain), out(y);
    const rms_norm::Problem p{x.rows(), weight.as({0}), eps, out.rows(), threads};
    if (!weight.fits({p.x.size}) || p.out.size != p.x.size || !same_count(p.x, p.out)) return false;
    if (weight.dtype() != x.dtype() || out.dtype() != x.dtype()) return false;
    nb::gil_scoped_release release;
    rms_norm::kernels().norm(p);
    return true;
}

bool try_selective_scan_step(nb::handle x_t, nb::handle state, nb::handle dt_t, nb::handle rates, nb::handle B_t,
                             nb::handle C_t, nb::handle skip, nb::handle gate, nb::handle dt_bias, nb::handle softplus,
                             nb::handle y, int threads) {
    const Argument x(x_t), h(state), dt(dt_t), A(rates), B(B_t), C(C_t), D(skip), z(gate), bias(dt_bias), out(y);
    if (!x.fits({kAnySize, kAnySize}) || !A.fits({x.size(1), kAnySize}) || !is_flag(softplus)) return false;
    const int64_t batch = x.size(0), channels = x.size(1), states = A.size(1);
    if (!B.fits({batch, kAnySize, states}) || channels % B.size(1) != 0 || !C.fits({batch, B.size(1), states})) return false;
    if (!dt.fits({batch, channels}) || !z.absent_or_fits({batch, channels}) || !out.fits({batch, channels})) return false;
    if (!D.absent_or_fits({channels}) || !bias.absent_or_fits({channels})) return false;
    if (!h.fits({batch, channels, states}) || !carries(h, x) || h.expanded() || out.dtype() != x.dtype()) return false;
    selective_scan::Problem p{};
    p.sequences.resize(batch);
    p.tokens = batch;
    p.channels = channels;
    p.states = states;
    p.groups = B.size(1);
    p.softplus = softplus.ptr() == Py_True;
    p.threads = threads;
    p.x = x.as({0, 1});
    p.dt = dt.as({0, 1});
    p.A = A.as({0, 1});
    p.B = B.as({0, 1, 2});
    p.C = C.as({0, 1, 2});
    p.D = D.as({0});
    p.z = z.as({0, 1});
    p.dt_bias = bias.as({0});
    p.out = out.as({0, 1});
    p.final_state = h.as({0, 1, 2});
    nb::gil_scoped_release release;
    selective_scan::kernels().step(p);
    return true;
}

bool try_ssd_step(nb::handle x_t, nb::handle state, nb::handle dt_t, nb::handle rates, nb::handle B_t, nb::handle C_t,
                  nb::handle skip, nb::handle gate, nb::handle dt_bias, nb::handle softplus, nb::handle range, nb::handle y,
                  nb::handle out_state, int threads) {
    const Argument x(x_t), h(state), dt(dt_t), A(rates), B(B_t), C(C_t), D(skip), z(gate), bias(dt_bias), out(y), next(out_state);
    ssd::Problem p{};
    if (!x.fits({kAnySize, kAnySize, kAnySize}) || !is_flag(softplus) || !read_range(range, p.low, p.high)) return false;
    const int64_t batch = x.size(0), heads = x.size(1), dim = x.size(2);
    if (!B.fits({batch, kAnySize, kAnySize}) || heads % B.size(1) != 0 || !C.fits({batch, B.size(1), B.size(2)})) return false;
    if (!dt.fits({batch, heads}) || !A.fits({heads}) || !bias.absent_or_fits({heads})) return false;
    if (!D.absent_or_fits({heads}) && !D.fits({heads, dim})) return false;
    if (!z.absent_or_fits({batch, heads, dim}) || !out.fits({batch, heads, dim})) return false;
    if (!h.fits({batch, heads, dim, B.size(2)}) || !next.fits({batch, heads, dim, B.size(2)})) return false;
    if (!carries(h, x) || next.dtype() != wide(x.dtype()) || out.dtype() != x.dtype()) return false;
    if (next.expanded() || next.overlaps(h)) return false;
    if (B.dtype() != x.dtype() || C.dtype() != x.dtype() || (!z.absent() && z.dtype() != x.dtype())) return false;
    for (int64_t i = 0; i < batch; ++i) p.sequences.push_back({i, 0, 1, i});
    p.heads = heads;
    p.group = heads / B.size(1);
    p.dim = dim;
    p.state_dim = B.size(2);
    p.chunk = 1;
    p.softplus = softplus.ptr() == Py_True;
    p.threads = threads;
    p.x = x.as({0, -1, 1, 2});
    p.dt = dt.as({0, -1, 1});
    p.A = A.as({0});
    p.B = B.as({0, -1, 1, 2});
    p.C = C.as({0, -1, 1, 2});
    p.D = D.fits({heads}) ? D.as({0}) : D.as({0, 1});
    p.z = z.as({0, -1, 1, 2});
    p.dt_bias = bias.as({0});
    p.initial_state = h.as({0, 1, 2, 3});
    p.out = out.as({0, -1, 1, 2});
    p.final_state = next.as({0, 1, 2, 3});
    nb::gil_scoped_release release;
    ssd::kernels().step(p);
    return true;
}

// None is let in everywhere, to be refused where it does not fit.
template <class... Arguments>
void define(nb::module_& m, const char* name, bool (*step)(Arguments...)) {
    m.def(name, step, (static_cast<Arguments*>(nullptr), nb::arg().none())...);
}

}  // namespace

void bind_steps(nb::module_& m) {
    m.def("read_tensors_of", read_tensors_of);
    define(m, "try_causal_conv1d_step", try_causal_conv1d_step);
    define(m, "try_linear", try_linear);
    define(m, "try_rms_norm", try_rms_norm);
    define(m, "try_selective_scan_step", try_selective_scan_step);
    define(m, "try_ssd_step", try_ssd_step);
}

}  // namespace onchip
