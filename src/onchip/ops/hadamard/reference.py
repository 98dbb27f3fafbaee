"""The definition of the Walsh–Hadamard transform, in plain PyTorch: any dtype, any device, differentiable.

Everything else that calls itself a Hadamard transform is compared with this file.
"""

import torch
from torch import Tensor


def hadamard(x: Tensor, signs: Tensor | None, scale: float) -> Tensor:
    """`onchip.hadamard`; arguments already checked. Arithmetic is in float32, in float64 for float64 inputs."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(dtype) if signs is None else x.to(dtype) * signs.to(dtype)
    return (scale * _times_hadamard(y)).to(x.dtype)


def _times_hadamard(x: Tensor) -> Tensor:
    """x H, with H₁ = [1] and H₂ₙ = [[Hₙ, Hₙ], [Hₙ, -Hₙ]]: for each bit of the index, a sum and a difference."""
    n = x.shape[-1]
    for bit in range(n.bit_length() - 1):
        a, b = x.reshape(*x.shape[:-1], n >> (bit + 1), 2, 1 << bit).unbind(-2)
        x = torch.stack([a + b, a - b], dim=-2).flatten(-3)
    return x
