"""How far a result may be from the exact one: what eager PyTorch in the same dtype and a few roundings allow."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .support import F64, Case, case, forward, run


def eager(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The scan as one writes it in a few lines of PyTorch: every step in x's dtype."""
    dtype, group = x.dtype, x.shape[-1] // B.shape[2]
    A = A.to(dtype)
    dt = dt if dt_bias is None else dt + dt_bias.to(dtype)
    dt = F.softplus(dt) if dt_softplus else dt
    h = torch.zeros(x.shape[0], *A.shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    ys = []
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        B_t, C_t = (u.repeat_interleave(group, 1) for u in (B_t, C_t))
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * x_t)[..., None] * B_t
        ys.append((h * C_t).sum(-1))
    y = torch.stack(ys, 1)
    y = y if D is None else y + D.to(dtype) * x
    return (y if z is None else y * F.silu(z)), h.to(F64 if dtype == F64 else torch.float32)


@functools.cache
def bounds(
    dtype: torch.dtype, gradients: bool, items: tuple[tuple[str, Any], ...]
) -> tuple[Case, dict[str, Tensor], dict[str, float]]:
    """A case in `dtype`, its exact results, and how far eager PyTorch is from them at most."""
    call = case(**dict(items)).to(dtype)
    how = run if gradients else forward
    exact, plain = how(call.to(F64), "reference"), how(call, scan=eager)
    return call, exact, {n: float((plain[n].double() - exact[n]).abs().max()) for n in exact}


def assert_twice_eager(dtype: torch.dtype, backend: str, *, gradients: bool = True, **items: Any) -> None:
    """An error of at most twice eager's, one rounding to the result's dtype, and four of float32 of the largest."""
    call, exact, eagers = bounds(dtype, gradients, tuple(items.items()))
    got = (run if gradients else forward)(call, backend)
    for name, want in exact.items():
        error = (got[name].double() - want).abs()
        slack = torch.finfo(got[name].dtype).eps * want.abs() + 4 * torch.finfo(torch.float32).eps * want.abs().max()
        excess = float((error - 2 * eagers[name] - slack).max())
        assert excess <= 0, f"{name}: error {error.max():.3e}, eager's {eagers[name]:.3e}, {excess:.3e} too much"
