"""mamba_ssm.ops.triton.layernorm_gated: the root-mean-square norm with Mamba-2's gate."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onchip.integrations.mamba_ssm._arguments import check_are_tensors
from onchip.nn.norm import rms_norm_gated
from onchip.ops._count import check_count
from onchip.ops._sequence import check_tensor

__all__ = ["RMSNorm", "rmsnorm_fn"]


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """The norm of each group of `group_size` features, times `weight`, plus `bias`; the gate `silu(z)` before or after.

    `x`, `z (..., dim)`; `weight`, `bias (dim,)`. Computed in float32 and rounded once, to x's dtype.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; `group_size` does not divide dim.

    >>> import torch
    >>> rmsnorm_fn(torch.randn(2, 5, 16), torch.ones(16), None, torch.randn(2, 5, 16), group_size=8).shape
    torch.Size([2, 5, 16])
    """
    check_are_tensors(x=x)
    dim = x.shape[-1]
    group_size = dim if group_size is None else group_size
    check_count("group_size", group_size)
    if group_size < 1 or dim % group_size:
        raise ValueError(f"group_size must divide x's {dim} features, got {group_size}")
    for name, u, shape in (("weight", weight, (dim,)), ("bias", bias, (dim,)), ("z", z, tuple(x.shape))):
        if u is not None or name == "weight":
            check_tensor(name, u, shape, x, any_float=True)
    groups = dim // group_size
    if bias is None:
        return rms_norm_gated(x, z, weight, n_groups=groups, norm_before_gate=norm_before_gate, eps=eps)
    y = rms_norm_gated(x, None if norm_before_gate else z, weight, n_groups=groups, eps=eps) + bias
    return (y * F.silu(z) if z is not None and norm_before_gate else y).to(x.dtype)


class RMSNorm(nn.Module):
    """The norm as a module; `forward(x, z=None)`.

    >>> import torch
    >>> RMSNorm(16, group_size=8, norm_before_gate=False)(torch.randn(2, 5, 16), torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """The norm of `x (..., hidden_size)`, gated by z."""
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)
