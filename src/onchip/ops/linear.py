"""The linear map, which for few rows is a matter of reading the weights.

Not a registered op: it is PyTorch's own, but for the rows that a model decodes on a CPU. Whatever traces, transforms or
differentiates it sees PyTorch's.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from onchip.ops import _step

MAX_ROWS = 8  # as native/linear has it


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""`torch.nn.functional.linear`, which on a CPU reads the weights at the rate of memory where x has few rows.

        y = x weightᵀ + bias

    A native kernel serves up to 8 rows in float32, bfloat16 and float16 where no gradient is wanted, as in decoding.
    PyTorch serves all other calls, those under autocast, `torch.compile` and `torch.func` among them.

    Args:
        x: `(..., in)`, floating; any strides.
        weight: `(out, in)`, in x's dtype.
        bias: `(out,)`, in x's dtype.

    Returns:
        `(..., out)`, in x's dtype.

    Raises:
        RuntimeError, TypeError: what PyTorch does not take, in its words.

    Numerics: the kernel's products are summed in float32, and rounded once with the bias. Its bits are the same on
    every run, on any number of threads, and a row's do not depend on how many rows there are.
    Cost: 2·in·out operations a row. The floor is one read of the weights: with one row the kernel takes little more.

    Differentiable as PyTorch's.

    >>> import torch, onchip
    >>> x, weight = torch.randn(2, 64), torch.randn(100, 64)
    >>> y = onchip.linear(x, weight)
    >>> torch.allclose(y, x @ weight.T, atol=1e-4), torch.equal(onchip.linear(x[:1], weight), y[:1])
    (True, True)
    """
    if _step.in_place_of_pytorchs(x, weight, bias) and _may_be_few(x, weight):
        y = x.new_empty((*x.shape[:-1], weight.shape[0]))
        if _step.kernels.try_linear(x, weight, bias, y, torch.get_num_threads()):
            return y
    return F.linear(x, weight, bias)


def _may_be_few(x: Tensor, weight: Tensor) -> bool:
    """Whether these are few rows and a matrix, as far as it takes to make room for the result."""
    return isinstance(weight, Tensor) and weight.ndim == 2 and x.ndim > 0 and x.numel() <= MAX_ROWS * x.shape[-1]
