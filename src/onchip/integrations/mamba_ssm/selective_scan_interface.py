"""mamba_ssm.ops.selective_scan_interface: Mamba's scan and its fused block, features before time."""

import torch
from torch import Tensor
from torch.nn import functional as F

from onchip.integrations.mamba_ssm._arguments import check_are_tensors, refuse_complex
from onchip.ops import causal_conv1d, selective_scan
from onchip.ops._sequence import WithFinalState, check_tensor

__all__ = ["mamba_inner_fn", "selective_scan_fn"]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's selective scan; see `onchip.selective_scan`.

    Args:
        u: `(batch, dim, length)`.
        delta: as u: the steps.
        A: `(dim, d_state)`, real.
        B: `(batch, d_state, length)`, `(batch, groups, d_state, length)`, or `(dim, d_state)` for all tokens alike.
        C: as B; the two need not have the same form.
        D: `(dim,)`.
        z: as u: the gate.
        delta_bias: `(dim,)`.
        delta_softplus: take the softplus of delta + delta_bias.
        return_last_state: return the last state, too.

    Returns:
        `(batch, dim, length)` in u's dtype; with `return_last_state` also `(batch, dim, d_state)` in float32, through
        which gradients flow (mamba_ssm drops them).

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, complex ones among them.

    >>> import torch
    >>> u, delta, B, C = torch.randn(2, 8, 30), torch.rand(2, 8, 30), torch.randn(2, 4, 30), torch.randn(2, 4, 30)
    >>> out, last = selective_scan_fn(u, delta, -torch.rand(8, 4), B, C, return_last_state=True)
    >>> out.shape, last.shape
    (torch.Size([2, 8, 30]), torch.Size([2, 8, 4]))
    """
    out, last = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (out, last) if return_last_state else out


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None = None,
) -> WithFinalState:
    """`selective_scan_fn` from an initial state `(batch, dim, d_state)` on, which mamba_ssm's has not."""
    check_are_tensors(u=u, delta=delta, A=A, B=B, C=C, **({} if z is None else {"z": z}))
    refuse_complex(A=A, B=B, C=C)
    B_t, C_t = _time_first("B", B, u), _time_first("C", C, u)
    if B_t.shape[2] != C_t.shape[2]:
        B_t, C_t = (b.repeat_interleave(u.shape[1] // b.shape[2], dim=2) for b in (B_t, C_t))
    out, last = selective_scan(
        u.mT,
        delta.mT,
        A,
        B_t,
        C_t,
        D=D,
        z=None if z is None else z.mT,
        dt_bias=delta_bias,
        dt_softplus=delta_softplus,
        initial_state=initial_state,
        return_final_state=True,
    )
    return WithFinalState(out.mT, last)


def _time_first(name: str, B: Tensor, u: Tensor) -> Tensor:
    """`(batch, length, groups, d_state)` of what mamba_ssm has in three forms; a view."""
    if B.ndim == 2:
        check_tensor(name, B, (u.shape[1], "d_state"), u, any_float=True)
        return B.expand(u.shape[0], u.shape[2], *B.shape)
    if B.ndim == 3:
        return B.mT[:, :, None]
    if B.ndim == 4:
        if B.shape[1] == 0 or u.shape[1] % B.shape[1]:
            raise ValueError(f"{name}'s groups must divide u's {u.shape[1]} channels, got {B.shape[1]}")
        return B.permute(0, 3, 1, 2)
    raise ValueError(
        f"{name} must be (dim, d_state), (batch, d_state, length) or (batch, groups, d_state, length), "
        f"got {tuple(B.shape)}"
    )


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba block between its projections: convolution, SiLU, the scan's own projections, scan, gate, output.

    Args:
        xz: `(batch, 2·dim, length)`: what is scanned, and the gate below it.
        conv1d_weight: `(dim, 1, width)`.
        conv1d_bias: `(dim,)`.
        x_proj_weight: `(dt_rank + d_state for each of B and C that is not given, dim)`.
        delta_proj_weight: `(dim, dt_rank)`.
        out_proj_weight: `(d_model, dim)`.
        out_proj_bias: `(d_model,)`.
        A, B, C, D, delta_bias, delta_softplus: as of `selective_scan_fn`; B and C by default from the projection.
        B_proj_bias, C_proj_bias: `(d_state,)`, added to the projected ones; None where these are given.
        checkpoint_lvl: 0 or 1, which of the intermediate results mamba_ssm's backward pass computes again. It changes
            no number; here autograd keeps them.
        b_rms_weight, c_rms_weight, dt_rms_weight: `(d_state,)`, `(d_state,)`, `(dim,)`: RMS norms of B, C and delta,
            with `b_c_dt_rms_eps`. As in mamba_ssm delta is normalised after its projection (transformers' FalconMamba
            does so before).

    Returns:
        `(batch, length, d_model)`.

    Raises:
        ValueError, TypeError: shapes, dtypes, a `checkpoint_lvl` or a bias of a projection that do not fit.

    >>> import torch
    >>> xz, conv, A = torch.randn(2, 16, 30), torch.randn(8, 1, 4), -torch.rand(8, 4)
    >>> x_proj, delta_proj, out_proj = torch.randn(2 + 4 + 4, 8), torch.randn(8, 2), torch.randn(6, 8)
    >>> mamba_inner_fn(xz, conv, None, x_proj, delta_proj, out_proj, None, A).shape
    torch.Size([2, 30, 6])
    """
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"checkpoint_lvl must be 0 or 1, got {checkpoint_lvl!r}")
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d(x.mT, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    rank, N = delta_proj_weight.shape[1], A.shape[-1]
    sizes = [rank, *(0 if given is not None else N for given in (B, C))]
    check_tensor("x_proj_weight", x_proj_weight, (sum(sizes), x.shape[-1]), xz, any_float=True)
    delta, B_x, C_x = torch.split(F.linear(x, x_proj_weight), sizes, dim=-1)
    delta = _rms("dt", F.linear(delta, delta_proj_weight), dt_rms_weight, b_c_dt_rms_eps)
    B = _normed("B", B, B_x, B_proj_bias, b_rms_weight, b_c_dt_rms_eps)
    C = _normed("C", C, C_x, C_proj_bias, c_rms_weight, b_c_dt_rms_eps)
    y = scan(x.mT, delta.mT, A, B, C, D, z, delta_bias, delta_softplus).out
    bias = None if out_proj_bias is None else out_proj_bias.to(out_proj_weight.dtype)
    return F.linear(y.mT, out_proj_weight, bias)


def _normed(
    name: str, given: Tensor | None, projected: Tensor, bias: Tensor | None, weight: Tensor | None, eps: float
) -> Tensor:
    """B or C, `(batch, d_state, length)` where it is projected."""
    if given is None:
        given = (projected if bias is None else projected + bias).mT
    elif bias is not None:
        raise ValueError(f"{name}_proj_bias must be None where {name} is given: it is added to what is projected")
    return given if weight is None else _rms(name.lower(), given.mT, weight, eps).mT


def _rms(name: str, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    check_tensor(f"{name}_rms_weight", weight, (x.shape[-1],), x, any_float=True)
    return F.rms_norm(x, weight.shape, weight, eps).to(x.dtype)
