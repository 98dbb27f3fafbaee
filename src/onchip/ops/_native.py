"""The native CPU kernels, or why there are none, and tensors as these take them."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

missing: str | None = None
kernels: Any = None

try:
    kernels = import_module("onchip._native")
except ImportError as error:
    missing = f"the native CPU kernels are not installed ({error}); a C++20 compiler at install time builds them"

Described = tuple[int, int, int, int, int, int]
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def describe(x: Tensor, *, packed: bool = False) -> Described:
    """A tensor of at most four dimensions: its address, element type and strides. A `packed` one is a batch of one."""
    strides = (0, *x.stride()) if packed else x.stride()
    return (x.data_ptr(), _DTYPES[x.dtype], *strides, *(0,) * (4 - len(strides)))  # type: ignore[return-value]
