"""mamba_ssm.ops.triton.selective_state_update: one token of Mamba or Mamba-2, the state updated in place."""

import torch
from torch import Tensor

from onchip.integrations.mamba_ssm._arguments import check_are_tensors
from onchip.ops import selective_scan_step, ssd_step
from onchip.ops._sequence import STATE_DTYPES, check_tensor

__all__ = ["selective_state_update"]


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token; see `onchip.selective_scan_step` and, where a head has one decay, `onchip.ssd_step`.

    Args:
        state: `(batch, dim, d_state)`, or `(batch, heads, dim, d_state)` with heads in all that follows, in any
            floating dtype, as the others; updated in place. With `state_batch_indices` it may have another batch.
        x: `(batch, dim)`.
        dt: as x.
        A: `(dim, d_state)`.
        B: `(batch, d_state)`, or `(batch, groups, d_state)`.
        C: as B.
        D: `(dim,)`.
        z: as x: the gate.
        dt_bias: `(dim,)`.
        dt_softplus: take the softplus of dt + dt_bias.
        state_batch_indices: `(batch,)` int32 or int64: which row of `state` is whose; none twice. A negative one is
            padding: its output is zero, and no state is touched.

    Returns:
        `(batch, dim)`, or `(batch, heads, dim)`, in x's dtype. Gradients flow where they are recorded, through the
        state too; then the step works on a copy of it.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.

    Where A, dt and dt_bias are one number per head, expanded (strides of 0), as Mamba-2 has them, a head's decay is
    computed once.

    >>> import torch
    >>> state, x, dt = torch.zeros(2, 8, 4), torch.randn(2, 8), torch.rand(2, 8)
    >>> selective_state_update(state, x, dt, -torch.rand(8, 4), torch.randn(2, 4), torch.randn(2, 4)).shape
    torch.Size([2, 8])
    >>> bool(state.any())
    True
    """
    check_are_tensors(state=state, x=x, B=B, C=C)
    _check(state, x, dt, A, dt_bias, state_batch_indices)
    rows = state if state_batch_indices is None else state[state_batch_indices.clamp(min=0)]
    given = (x, rows, dt, A, B, C, D, z, dt_bias)
    recorded = torch.is_grad_enabled() and any(u is not None and u.requires_grad for u in given)
    wide = STATE_DTYPES.get(x.dtype, rows.dtype)
    if recorded or rows.dtype != wide or not rows.is_contiguous():
        # Also a copy where gradients are recorded: autograd must not save the state, which changes below.
        rows = rows.to(wide, copy=True, memory_format=torch.contiguous_format)
    B, C = (u if u.ndim == 3 else u[:, None] for u in (B, C))
    step = _mamba2_step if state.ndim == 4 and _one_decay_per_head(dt, A, dt_bias) else _mamba_step
    y, new = step(rows, x, dt, A, B, C, D, z, dt_bias, dt_softplus, in_place=not recorded)
    if state_batch_indices is not None:
        used = state_batch_indices >= 0
        state[state_batch_indices[used]] = new[used].to(state.dtype)
        y = y.masked_fill(~used.view(-1, *[1] * (y.ndim - 1)), 0.0)
    elif new is not state:
        state.copy_(new)
    return y


def _check(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, dt_bias: Tensor | None, state_batch_indices: Tensor | None
) -> None:
    """What is looked at here before the step sees it; the step checks the others."""
    check_tensor("x", x, ("batch", "dim") if x.ndim == 2 else ("batch", "heads", "dim"), x, any_float=True)
    rows = x.shape[0] if state_batch_indices is None else "rows"
    check_tensor("state", state, (rows, *x.shape[1:], "d_state"), x, any_float=True)
    check_tensor("dt", dt, tuple(x.shape), x, any_float=True)
    check_tensor("A", A, tuple(state.shape[1:]), x, any_float=True)
    if dt_bias is not None:
        check_tensor("dt_bias", dt_bias, tuple(x.shape[1:]), x, any_float=True)
    if state_batch_indices is None:
        return
    if state_batch_indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"state_batch_indices must be int32 or int64, got {state_batch_indices.dtype}")
    if state_batch_indices.shape != x.shape[:1]:
        raise ValueError(f"state_batch_indices must have shape ({x.shape[0]},), got {tuple(state_batch_indices.shape)}")


def _mamba2_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    """`(batch, heads, dim)` with one decay per head."""
    dt_bias = None if dt_bias is None else dt_bias[..., 0]
    dtype, out_state = x.dtype, state if in_place else None
    if any(u is not None and u.dtype != dtype for u in (B, C, z)):  # they have x's dtype in `ssd_step`
        x, B, C = (u.to(state.dtype) for u in (x, B, C))
        z = None if z is None else z.to(state.dtype)
    y, new = ssd_step(
        x, state, dt[..., 0], A[:, 0, 0], B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, out_state=out_state
    )
    return y.to(dtype), new


def _mamba_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    """`(batch, dim)`; heads, if there are any, one after the other, which keeps each in its group of B and C."""
    channels = state.view(state.shape[0], -1, state.shape[-1])
    x_t, dt_t = x.flatten(1), dt.flatten(1)
    D, dt_bias = (None if u is None else u.flatten() for u in (D, dt_bias))
    y, new = selective_scan_step(
        x_t,
        channels,
        dt_t,
        A.reshape(channels.shape[1:]),
        B,
        C,
        D=D,
        z=None if z is None else z.flatten(1),
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        out_state=channels if in_place else None,
    )
    return y.view(x.shape), state if in_place else new.view(state.shape)


def _one_decay_per_head(dt: Tensor, A: Tensor, dt_bias: Tensor | None) -> bool:
    expanded = A.stride()[-2:] == (0, 0) and dt.stride(-1) == 0
    return expanded and (dt_bias is None or dt_bias.stride(-1) == 0)
