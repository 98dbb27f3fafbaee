"""The Walsh–Hadamard transform on the native CPU kernel (native/hadamard): the op's CPU implementation.

The kernel takes any strides and any power of two. It reads a block of rows into cache, widening 16-bit inputs,
transforms it there and writes it: memory is read once and written once.
"""

import torch
from torch import Tensor

from onchip.ops import _native
from onchip.ops.hadamard.rows import in_four_dimensions

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_Described = tuple[int, int, int, int, int, int]


def limits(x: Tensor) -> str | None:
    """Why the native kernel cannot serve this call, or None."""
    return _native.missing


def transform(x: Tensor, before: Tensor | None, after: Tensor | None, scale: float) -> Tensor:
    """The op on the CPU."""
    out = x.new_empty(x.shape)
    x = in_four_dimensions(x)
    sizes = (*x.shape, torch.get_num_threads())
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    before, after = (None if f is None else f.to(wide).contiguous() for f in (before, after))
    tensors = (_describe(x), _factors(before), _factors(after), (out.data_ptr(), _DTYPES[out.dtype], 0, 0, 0, 1))
    _native.kernels.hadamard_transform(sizes, scale, tensors)
    return out


def _describe(x: Tensor) -> _Described:
    return (x.data_ptr(), _DTYPES[x.dtype], *x.stride())  # type: ignore[return-value]


def _factors(x: Tensor | None) -> _Described | None:
    return None if x is None else (x.data_ptr(), _DTYPES[x.dtype], 0, 0, 0, 1)
