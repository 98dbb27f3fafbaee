"""Norms that are more than a module of PyTorch's."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onchip.ops import rms_norm


class RMSNorm(nn.RMSNorm):
    """PyTorch's root-mean-square norm over the last dimension, with a weight and a given eps; see `onchip.rms_norm`.

    >>> RMSNorm(8, eps=1e-5)(torch.randn(3, 8)).shape
    torch.Size([3, 8])
    """

    def __init__(self, d: int, *, eps: float = 1e-5) -> None:
        super().__init__(d, eps)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d)` to `(..., d)`."""
        return rms_norm(x, self.weight, cast(float, self.eps))


def rms_norm_gated(
    x: Tensor, z: Tensor | None, weight: Tensor, *, n_groups: int = 1, norm_before_gate: bool = False, eps: float = 1e-5
) -> Tensor:
    """`RMSNormGated` as a function: `x`, `z (..., d)` and `weight (d,)` to `(..., d)`.

    >>> x, z = torch.randn(2, 2, 5, 16).unbind(0)
    >>> rms_norm_gated(x, z, torch.ones(16), n_groups=2).shape
    torch.Size([2, 5, 16])
    """
    if z is None and n_groups == 1 and weight.dtype == x.dtype:
        return rms_norm(x, weight, eps)
    dtype = torch.promote_types(x.dtype, torch.float32)
    y, gate = x.to(dtype), None if z is None else F.silu(z.to(dtype))
    if gate is not None and not norm_before_gate:
        y = y * gate
    weight = weight.to(dtype)
    if n_groups == 1:
        y = F.rms_norm(y, weight.shape, weight, eps)
    else:
        groups = y.view(*y.shape[:-1], n_groups, len(weight) // n_groups)
        y = F.rms_norm(groups, groups.shape[-1:], None, eps).flatten(-2) * weight
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)


class RMSNormGated(nn.Module):
    """A root-mean-square norm with a gate: Mamba-2's last step before its output projection.

        y = norm(x · silu(z)) · weight      or with `norm_before_gate`      y = norm(x) · weight · silu(z)
        norm(x)[g] = x[g] / √(mean(x[g]²) + eps)                            for every group g of d / n_groups features

    `x (..., d)` and `z (..., d)`, in any floating dtype, to `(..., d)` in x's; without `z` there is no gate. Computed
    in float32 (float64 for float64) and rounded once. Cost: a dozen operations per feature.

    Raises:
        ValueError: `n_groups` does not divide `d`.

    Source: Dao and Gu, Transformers are SSMs (arXiv 2405.21060, §7.1 and appendix E); the norm is Zhang and Sennrich's
    (arXiv 1910.07467).

    >>> x, z = torch.randn(2, 2, 5, 16).unbind(0)
    >>> y = RMSNormGated(16, n_groups=2)(x, z)
    >>> torch.allclose(y.unflatten(-1, (2, 8)).square().mean(-1), torch.ones(2, 5, 2), atol=1e-2)
    True
    """

    def __init__(self, d: int, *, n_groups: int = 1, norm_before_gate: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        if n_groups < 1 or d % n_groups:
            raise ValueError(f"n_groups must divide d = {d}, got {n_groups}")
        self.n_groups, self.norm_before_gate, self.eps = n_groups, norm_before_gate, eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """`(..., d)` to `(..., d)`."""
        return rms_norm_gated(
            x, z, self.weight, n_groups=self.n_groups, norm_before_gate=self.norm_before_gate, eps=self.eps
        )

    def extra_repr(self) -> str:
        """What `print` shows of it."""
        return f"{len(self.weight)}, n_groups={self.n_groups}, norm_before_gate={self.norm_before_gate}, eps={self.eps}"
