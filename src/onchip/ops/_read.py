"""Lengths and page tables as the CPU sees them, read from a GPU once and not in every layer of a model.

Reading stops the GPU's queue. A model hands the same tensors to all its layers: what was read is remembered as long as
the tensor lives unchanged. A tensor made in inference mode does not count its changes, and is read in every call.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_KNOWN = WeakTensorKeyDictionary()  # tensors: (their version, their values)


def read(x: Tensor) -> NDArray[Any]:
    """The values of `x`."""
    if not x.is_cuda:
        return x.numpy()
    if x.is_inference():
        return x.cpu().numpy()
    known = _KNOWN.get(x)  # type: ignore[no-untyped-call]
    if known is None or known[0] != x._version:
        known = (x._version, x.cpu().numpy())
        _KNOWN[x] = known
    return np.asarray(known[1])


def known(x: Tensor, like: Tensor) -> Tensor:
    """`x`, which is on the CPU, on the device of `like`, where it need not be read."""
    if not like.is_cuda or torch.compiler.is_compiling():
        return x.to(like.device)
    with torch.inference_mode(False):
        there = x.to(like.device, copy=True)
    _KNOWN[there] = (there._version, x.numpy())
    return there
