"""The definition of the selective scan, in plain PyTorch: any dtype, any device, differentiable, slow.

Everything else that calls itself a selective scan is compared with this file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from onchip.ops._sequence import STATE_DTYPES, segment_sums, sequences


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """`onchip.selective_scan` and the final state; arguments already checked."""
    if cu_seqlens is not None:
        return _packed(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus)
    wide = STATE_DTYPES[x.dtype]
    # A copy, so that the final state after no tokens is not the caller's own.
    h = x.new_zeros(x.shape[0], *A.shape, dtype=wide) if initial_state is None else initial_state.to(wide, copy=True)
    ys = []
    steps = time_steps(dt.to(wide), dt_bias, dt_softplus)
    for x_t, dt_t, B_t, C_t in zip(*(u.to(wide).unbind(1) for u in (x, steps, B, C)), strict=True):
        h = _advance(h, x_t, dt_t, A.to(wide), B_t)
        ys.append(_read_out(h, C_t))
    return _finish(torch.stack(ys, 1) if ys else x.to(wide), x, D, z), h


def _packed(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """One sequence after the other."""
    outs, states = [x[:0]], [x.new_zeros(0, *A.shape, dtype=STATE_DTYPES[x.dtype])]
    for i, rows in enumerate(sequences(cu_seqlens, x.shape[0])):
        x_i, dt_i, B_i, C_i = (u[None, rows] for u in (x, dt, B, C))
        z_i = None if z is None else z[None, rows]
        start = None if initial_state is None else initial_state[i : i + 1]
        out, state = selective_scan(x_i, dt_i, A, B_i, C_i, D, z_i, dt_bias, start, None, dt_softplus)
        outs.append(out[0])
        states.append(state)
    return torch.cat(outs), torch.cat(states)


def selective_scan_step(
    x: Tensor,
    state: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """`onchip.selective_scan_step`; arguments already checked."""
    wide = STATE_DTYPES[x.dtype]
    steps = time_steps(dt.to(wide), dt_bias, dt_softplus)
    h = _advance(state.to(wide), x.to(wide), steps, A.to(wide), B.to(wide))
    return _finish(_read_out(h, C.to(wide)), x, D, z), h


def selective_scan_matrix(
    dt: Tensor, A: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor | None, dt_softplus: bool
) -> Tensor:
    """`onchip.selective_scan_matrix`; arguments already checked."""
    wide = STATE_DTYPES[dt.dtype]
    steps = time_steps(dt.to(wide), dt_bias, dt_softplus).transpose(1, 2)  # (B, D, T)
    passed = segment_sums(steps)
    into, out_of = (_of_channels(u.to(wide), A.shape[0], 2).permute(0, 3, 2, 1) for u in (B, C))  # (B, N, D, T)
    matrix = torch.zeros_like(passed)
    for n in range(A.shape[1]):  # one at a time: all of them would take N matrices' memory
        decay = torch.exp(A[:, n, None, None].to(wide) * passed)
        matrix = matrix + decay * out_of[:, n, :, :, None] * (into[:, n] * steps)[:, :, None]
    return matrix.tril()


def time_steps(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    """How far each token moves the time: dt + dt_bias, or its softplus."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    return F.softplus(dt) if dt_softplus else dt


def _advance(h: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return torch.exp(dt[..., None] * A) * h + (dt * x)[..., None] * _of_channels(B, A.shape[0], 1)


def _read_out(h: Tensor, C: Tensor) -> Tensor:
    return (_of_channels(C, h.shape[1], 1) * h).sum(-1)


def _of_channels(u: Tensor, channels: int, dim: int) -> Tensor:
    """Each channel's own copy of what its group shares."""
    return u.repeat_interleave(channels // u.shape[dim], dim)


def _finish(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + D.to(y.dtype) * x.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)
