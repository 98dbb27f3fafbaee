"""The fast Walsh–Hadamard transform: the public function and its argument checks."""

import math
import numbers
from typing import Literal

import torch
from torch import Tensor

from onchip.ops import _select, _triton
from onchip.ops.hadamard import cpu, op, reference

Backend = Literal["cpu", "triton", "reference"]

MAX_SIZE = 32768
TRITON_MAX_SIZE = 4096


def _triton_limits(x: Tensor) -> str | None:
    # Here and not beside the kernel, which is not imported before it runs.
    if x.shape[-1] > TRITON_MAX_SIZE:
        return f"a row is held in registers, which goes to a size of {TRITON_MAX_SIZE}, and the call's is {x.shape[-1]}"
    if x.dtype == torch.float64:
        return "it computes in float32, and the call is in float64"
    return _triton.limits(x.device)


IMPLEMENTATIONS = (
    _select.Implementation("cpu", cpu.limits, devices=("cpu", "meta")),
    _select.Implementation("triton", _triton_limits, _triton.DEVICES, on_request=_triton.interpreted_on()),
    _select.Implementation("reference"),
)


def hadamard(
    x: Tensor, signs: Tensor | None = None, *, scale: float | None = None, backend: Backend | None = None
) -> Tensor:
    r"""The Walsh–Hadamard transform of the last dimension, with signs multiplied in first.

        y = scale · (x ∘ signs) H,    H[i, j] = (-1)^popcount(i & j)

    H is Sylvester's matrix: symmetric, H H = n I. With the default scale the transform without signs is orthogonal and
    its own inverse. With signs of ±1, the same for both, it keeps products, hadamard(x, s) · hadamard(y, s) = x · y,
    while random ones spread an outlier of x evenly over the row, which is what makes rows easier to quantise.

    Args:
        x: `(..., n)`, n a power of two from 1 to 32768; float64, float32, bfloat16 or float16; any strides.
        signs: `(n,)`, floating or integer, of any values; taken in the type of the arithmetic.
        scale: finite factor; by default 1/√n.
        backend: "cpu", "triton" or "reference" asks for an implementation and raises where it cannot serve; by default
            the fastest that can. See `onchip.explain`. The kernel in Triton goes to n = 4096.

    Returns:
        `(..., n)`, in x's dtype, contiguous.

    Raises:
        ValueError: shapes or values that do not fit, naming the argument, what was expected and what came.
        TypeError: dtypes or devices that do not fit.

    Numerics: arithmetic in float32 (float64 for float64), rounded once at the end, gradients too. An element sums its n
    terms in pairs: its error is at most 2 + log₂ n roundings of scale · Σ|x ∘ signs| in the type of the arithmetic, and
    one rounding to x's dtype. The unscaled sum must not overflow. The same bits on every run, and a row's bits do not
    depend on the rest of the batch.
    Cost: n·log₂ n additions a row; x is read once, y written once. Differentiable any number of times in x and in
    floating signs, backward and forward, at the cost of one more transform for each.

    Source: Shah et al., FlashAttention-3 (arXiv 2407.08608, §3.3), where queries and keys are so transformed before
    they are rounded to 8 bits; the order of the stages is free, and here no permutation is left to undo.

    >>> import torch, onchip
    >>> x, y = torch.randn(2, 5, 64, dtype=torch.float64)
    >>> signs = torch.randint(2, (64,)) * 2 - 1
    >>> products = (onchip.hadamard(x, signs) * onchip.hadamard(y, signs)).sum(-1)
    >>> torch.allclose(products, (x * y).sum(-1))
    True
    """
    n = _check(x, signs, scale)
    scale = n**-0.5 if scale is None else float(scale)
    if _select.choose("hadamard", IMPLEMENTATIONS, backend, x) == "reference":
        return reference.hadamard(x, signs, scale)
    return op.hadamard(x, signs, None, scale, backend)


def _check(x: Tensor, signs: Tensor | None, scale: float | None) -> int:
    """The arguments fit each other; the size of the transform."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"x must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    n = int(x.shape[-1])
    if not 1 <= n <= MAX_SIZE or n & (n - 1):
        raise ValueError(f"x's last dimension must be a power of two from 1 to {MAX_SIZE}, got {n}: {_nearest(n)}")
    if signs is not None:
        _check_signs(signs, x, n)
    if scale is not None:
        if not isinstance(scale, float | int | numbers.Real):
            raise TypeError(f"scale must be a number, got {type(scale).__name__}")
        if not -math.inf < scale < math.inf:
            raise ValueError(f"scale must be finite, got {scale}")
    return n


def _nearest(n: int) -> str:
    if n < 1:
        return "the nearest is 1"
    if n > MAX_SIZE:
        return f"the nearest is {MAX_SIZE}"
    return f"{1 << n.bit_length() - 1} and {1 << n.bit_length()} are next to it"


def _check_signs(signs: Tensor, x: Tensor, n: int) -> None:
    if not isinstance(signs, Tensor):
        raise TypeError(f"signs must be a tensor, got {type(signs).__name__}")
    if signs.dtype == torch.bool or signs.is_complex():
        raise TypeError(f"signs must be floating or integer, ±1 and not true or false, got {signs.dtype}")
    if signs.device != x.device:
        raise TypeError(f"signs must be on x's device {x.device}, got {signs.device}")
    if signs.shape != (n,):
        raise ValueError(f"signs must have shape ({n},), as x's last dimension, got {tuple(signs.shape)}")


_select.register(hadamard, IMPLEMENTATIONS, tensors=1)
