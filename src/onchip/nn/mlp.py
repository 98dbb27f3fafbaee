"""Multilayer perceptrons, which mix features where a mixer mixes time."""

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from onchip.nn.linear import Linear


class GatedMLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) · up(x))`.

    `x (..., d_model)` to `(..., d_model)` through `d_hidden` features. `gate` and `up` are one projection.
    Cost: 6·d_model·d_hidden operations per token.

    Source: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202), FFN_SwiGLU.

    >>> import torch
    >>> GatedMLP(16, 40)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, d_model: int, d_hidden: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = Linear(d_model, 2 * d_hidden, bias=bias)
        self.out = Linear(d_hidden, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d_model)` to `(..., d_model)`."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return cast(Tensor, self.out(F.silu(gate) * up))


class MLP(nn.Module):
    """`down(gelu(up(x)))`, with GELU's tanh approximation.

    `x (..., d_model)` to `(..., d_model)` through `d_hidden` features. Cost: 4·d_model·d_hidden operations per token.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units (arXiv 1606.08415), the tanh form of section 2.

    >>> import torch
    >>> MLP(16, 64, bias=True)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, d_model: int, d_hidden: int, *, bias: bool = False) -> None:
        super().__init__()
        self.up = Linear(d_model, d_hidden, bias=bias)
        self.out = Linear(d_hidden, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d_model)` to `(..., d_model)`."""
        return cast(Tensor, self.out(F.gelu(self.up(x), approximate="tanh")))
