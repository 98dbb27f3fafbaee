// The Hadamard transform as Python calls it.
#include "bindings.hpp"

#include "hadamard/problem.hpp"

ONCHIP_KERNELS(hadamard)

namespace nb = nanobind;

namespace onchip::hadamard {
namespace {

// Sizes are (a, b, c, n, threads): three leading dimensions and the transform's.
void transform(const std::array<int64_t, 5>& sizes, double scale, const DescribedTensors<4>& tensors) {
    const Problem p{{sizes[0], sizes[1], sizes[2]},
                    sizes[3],
                    scale,
                    tensor(tensors[0]),
                    tensor(tensors[1]),
                    tensor(tensors[2]),
                    tensor(tensors[3]),
                    int(sizes[4])};
    nb::gil_scoped_release release;
    kernels().transform(p);
}

}  // namespace

void bind(nb::module_& m) { m.def("hadamard_transform", transform); }

}  // namespace onchip::hadamard
