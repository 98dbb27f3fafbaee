// What the bindings of all ops share: tensors as Python describes them, and the kernels of the instruction set in use.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "common/tensor.hpp"

namespace onchip {

enum class InstructionSet { baseline, avx2, avx512 };

// In use, by all ops.
extern InstructionSet instruction_set;

// Declares an op's kernels, of which there are some for each instruction set, and `op::kernels()`, those to call.
#ifdef ONCHIP_X86
#define ONCHIP_KERNELS(op)                                                                              \
    namespace onchip {                                                                                  \
    namespace baseline { extern const op::Kernels op##_kernels; }                                       \
    namespace avx2 { extern const op::Kernels op##_kernels; }                                           \
    namespace avx512 { extern const op::Kernels op##_kernels; }                                         \
    namespace op {                                                                                      \
    inline const Kernels& kernels() {                                                                   \
        switch (instruction_set) {                                                                      \
            case InstructionSet::avx512: return avx512::op##_kernels;                                   \
            case InstructionSet::avx2: return avx2::op##_kernels;                                       \
            default: return baseline::op##_kernels;                                                     \
        }                                                                                               \
    }                                                                                                   \
    }                                                                                                   \
    }
#else
#define ONCHIP_KERNELS(op)                                                                              \
    namespace onchip {                                                                                  \
    namespace baseline { extern const op::Kernels op##_kernels; }                                       \
    namespace op { inline const Kernels& kernels() { return baseline::op##_kernels; } }                 \
    }
#endif

// A tensor: (address, element type, four strides). Numbers, so that a call costs a microsecond.
using Described = std::array<int64_t, 6>;
template <size_t N>
using DescribedTensors = std::array<std::optional<Described>, N>;

inline Tensor tensor(const std::optional<Described>& d) {
    if (!d) return {};
    return {reinterpret_cast<char*>((*d)[0]), DType((*d)[1]), {(*d)[2], (*d)[3], (*d)[4], (*d)[5]}};
}

template <size_t N>
void assign(Tensor* const (&targets)[N], const DescribedTensors<N>& tensors) {
    for (size_t i = 0; i < N; ++i) *targets[i] = tensor(tensors[i]);
}

}  // namespace onchip
