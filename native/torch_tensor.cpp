#include "torch_tensor.hpp"

#include <algorithm>

namespace nb = nanobind;

namespace onchip {
namespace {

// The table of functions in the capsule `__dlpack_c_exchange_api__`, as DLPack 1.3 lays it out.
struct Exchange {
    uint32_t major, minor;
    const void* previous;
    void *allocate, *own, *give;
    int (*borrow)(void* object, nb::dlpack::dltensor* to);
    void* stream;
};

constexpr int kCpu = 1, kFloat = 2, kBfloat = 4;  // of devices and of element types

PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;
PyObject* is_negated = nullptr;
int (*borrow)(void*, nb::dlpack::dltensor*) = nullptr;

bool element_type(nb::dlpack::dtype type, DType& to) {
    if (type.lanes != 1) return false;
    if (type.code == kBfloat && type.bits == 16) return to = DType::bfloat16, true;
    if (type.code != kFloat) return false;
    switch (type.bits) {
        case 16: return to = DType::float16, true;
        case 32: return to = DType::float32, true;
        case 64: return to = DType::float64, true;
        default: return false;
    }
}

}  // namespace

bool read_tensors_of(nb::handle tensor_class, nb::handle parameter_class) {
    if (!nb::hasattr(tensor_class, "__dlpack_c_exchange_api__")) return false;
    const nb::object capsule = tensor_class.attr("__dlpack_c_exchange_api__");
    const auto* const exchange = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (exchange == nullptr) PyErr_Clear();
    if (exchange == nullptr || exchange->major != 1 || exchange->borrow == nullptr) return false;
    tensor_type = reinterpret_cast<PyTypeObject*>(tensor_class.ptr());
    parameter_type = reinterpret_cast<PyTypeObject*>(parameter_class.ptr());
    is_negated = nb::object(tensor_class.attr("is_neg")).release().ptr();
    borrow = exchange->borrow;
    return true;
}

Argument::Argument(nb::handle x) : absent_(x.is_none()) {
    if (!absent_ && !read(x)) ndim_ = -1;
}

bool Argument::read(nb::handle x) {
    PyTypeObject* const type = Py_TYPE(x.ptr());
    if (borrow == nullptr || (type != tensor_type && type != parameter_type)) return false;
    nb::dlpack::dltensor found;
    if (borrow(x.ptr(), &found) != 0) {
        PyErr_Clear();
        return false;
    }
    if (found.device.device_type != kCpu || found.data == nullptr || found.ndim > 4) return false;
    if (!element_type(found.dtype, tensor_.dtype)) return false;
    tensor_.data = static_cast<char*>(found.data) + found.byte_offset;
    for (int i = 0; i < found.ndim; ++i) {
        sizes_[i] = found.shape[i];
        tensor_.strides[i] = found.strides[i];
        if (sizes_[i] == 0) return false;
    }
    PyObject* const arguments[] = {x.ptr()};
    const nb::object negated = nb::steal(PyObject_Vectorcall(is_negated, arguments, 1, nullptr));
    if (!negated.is_valid()) PyErr_Clear();
    ndim_ = found.ndim;
    return negated.ptr() == Py_False;
}

bool Argument::fits(std::initializer_list<int64_t> shape) const {
    if (ndim_ != int(shape.size())) return false;
    const int64_t* size = sizes_;
    for (const int64_t wanted : shape)
        if (*size++ != wanted && wanted != kAnySize) return false;
    return true;
}

bool Argument::expanded() const {
    for (int i = 0; i < ndim_; ++i)
        if (tensor_.strides[i] == 0 && sizes_[i] > 1) return true;
    return false;
}

bool Argument::overlaps(const Argument& other) const {
    const Tensor &a = tensor_, &b = other.tensor_;
    if (a.data == b.data && a.dtype == b.dtype && std::equal(a.strides, a.strides + 4, b.strides)) return false;
    return a.data < other.end() && b.data < end();
}

const char* Argument::end() const {
    int64_t last = 0;
    for (int i = 0; i < ndim_; ++i) last += (sizes_[i] - 1) * tensor_.strides[i];
    return tensor_.data + (last + 1) * item_size(tensor_.dtype);
}

Tensor Argument::as(std::initializer_list<int> dims) const {
    Tensor x{tensor_.data, tensor_.dtype};
    int64_t* stride = x.strides;
    for (const int dim : dims) *stride++ = dim < 0 ? 0 : tensor_.strides[dim];
    return x;
}

Rows Argument::rows() const {
    Rows x;
    if (ndim_ < 1) return x;
    const int before = ndim_ - 1;
    for (int i = 0; i < 3; ++i) x.sizes[i] = i < 3 - before ? 1 : sizes_[i - 3 + before];
    x.size = sizes_[before];
    x.tensor = tensor_;
    for (int i = 0; i < 4; ++i) x.tensor.strides[i] = i < 3 - before ? 0 : tensor_.strides[i - 3 + before];
    return x;
}

}  // namespace onchip
