// PyTorch's tensors as its class hands them out to C (DLPack's exchange of tensors): all about one in some 50 ns, where
// asking for its address, type and strides in Python takes a microsecond.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>

#include "common/tensor.hpp"

namespace onchip {

constexpr int64_t kAnySize = -1;

// From here on tensors are read through `tensor_class`; whether they can be. Of `parameter_class` are those too.
bool read_tensors_of(nanobind::handle tensor_class, nanobind::handle parameter_class);

// An argument that should be a plain tensor in the CPU's memory, of at most four dimensions, floating and not empty.
// Whatever else came (a subclass, a view that is to be negated, a tensor elsewhere) fits nothing.
class Argument {
public:
    explicit Argument(nanobind::handle x);

    bool absent() const { return absent_; }
    bool fits(std::initializer_list<int64_t> shape) const;
    bool absent_or_fits(std::initializer_list<int64_t> shape) const { return absent_ || fits(shape); }
    int64_t size(int dim) const { return sizes_[dim]; }
    DType dtype() const { return tensor_.dtype; }
    // Whether some of its elements are one in memory, as those of what is written must not be.
    bool expanded() const;
    // Whether some of its memory may be the other's, but for one that is the same altogether.
    bool overlaps(const Argument& other) const;
    // As the kernels take it: `dims` says which of its own dimensions each of theirs is, -1 for none.
    Tensor as(std::initializer_list<int> dims) const;
    // None where it has no dimension, or is not what it should be.
    Rows rows() const;

private:
    bool read(nanobind::handle x);
    const char* end() const;

    Tensor tensor_;
    int64_t sizes_[4] = {0, 0, 0, 0};
    int ndim_ = -1;
    bool absent_;
};

}  // namespace onchip
