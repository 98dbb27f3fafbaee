"""The definition of state space duality, in plain PyTorch: any dtype, any device, differentiable.

Everything else that calls itself ssd is compared with this file. Arguments are checked already. Arithmetic is in
float32, in float64 for float64 inputs.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from onchip.ops._sequence import STATE_DTYPES, segment_sums, sequences

CHUNK = 64


class Step(NamedTuple):
    """How dt becomes a step: plus a bias, through softplus, and clamped to a range."""

    bias: Tensor | None
    softplus: bool
    limit: tuple[float, float] | None

    @property
    def range(self) -> tuple[float, float]:
        """What the step is clamped to."""
        return self.limit or (-math.inf, math.inf)

    def __call__(self, dt: Tensor) -> Tensor:
        """The step, in dt's dtype."""
        if self.bias is not None:
            dt = dt + self.bias.to(dt.dtype)
        if self.softplus:
            dt = torch.nn.functional.softplus(dt)
        return dt if self.limit is None else dt.clamp(*self.limit)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    step: Step,
    chunk_size: int | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`onchip.ssd`'s output and final state."""
    dtype, heads = STATE_DTYPES[x.dtype], x.shape[-2]
    if cu_seqlens is not None:
        parts = []
        for i, rows in enumerate(sequences(cu_seqlens, x.shape[0])):
            of_one = [None if t is None else t[None, rows] for t in (x, dt, B, C, z)]
            state = None if initial_state is None else initial_state[i : i + 1]
            x1, dt1, B1, C1, z1 = of_one
            parts.append(ssd(x1, dt1, A, B1, C1, D, z1, step, chunk_size, state, None))  # type: ignore[arg-type]
        empty = x.new_zeros(0, heads, x.shape[-1], B.shape[-1], dtype=dtype)
        return torch.cat([x[:0], *(y[0] for y, _ in parts)]), torch.cat([empty, *(state for _, state in parts)])
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], heads, x.shape[-1], B.shape[-1])
    dt = step(dt.to(dtype))
    u, a = dt[..., None] * x.to(dtype), dt * A.to(dtype)
    b, c = (t.to(dtype).repeat_interleave(heads // t.shape[-2], -2) for t in (B, C))
    # A copy, so that the final state after no steps is not the caller's own.
    y, state = _scan(u, a, b, c, initial_state.to(dtype, copy=True), chunk_size or CHUNK)
    return _skip_and_gate(y, x, D, z), state


def _scan(u: Tensor, a: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """h[t] = exp(a[t]) h[t-1] + u[t] ⊗ B[t] and y[t] = h[t] C[t], a chunk of time after another."""
    outputs = [u[:, :0]]
    for begin in range(0, u.shape[1], chunk):
        u_c, a_c, B_c, C_c = (t[:, begin : begin + chunk] for t in (u, a, B, C))
        a_c = a_c.transpose(1, 2)  # (B, H, T)
        decay, from_start = _decays(a_c), a_c.cumsum(-1).exp()
        weights = torch.einsum("bihn,bjhn->bhij", C_c, B_c) * decay
        before = torch.einsum("bihn,bhpn->bhip", C_c, state) * from_start[..., None]
        outputs.append(torch.einsum("bhij,bjhp->bihp", weights, u_c) + before.transpose(1, 2))
        added = torch.einsum("bhj,bjhp,bjhn->bhpn", decay[..., -1, :], u_c, B_c)
        state = from_start[..., -1, None, None] * state + added
    return torch.cat(outputs, 1), state


def _decays(a: Tensor) -> Tensor:
    """exp(Σ a[k] over j < k ≤ i) at (i, j), and 0 above the diagonal."""
    return segment_sums(a).exp().tril()


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + x.to(y.dtype) * (D.to(y.dtype) if D.ndim == 2 else D.to(y.dtype)[:, None])
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(y.dtype))
    return y.to(x.dtype)


def ssd_step(
    x_t: Tensor,
    state: Tensor,
    dt_t: Tensor,
    A: Tensor,
    B_t: Tensor,
    C_t: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    step: Step,
) -> tuple[Tensor, Tensor]:
    """`onchip.ssd_step`'s output and new state."""
    dtype, heads = STATE_DTYPES[x_t.dtype], x_t.shape[-2]
    dt = step(dt_t.to(dtype))
    b, c = (t.to(dtype).repeat_interleave(heads // t.shape[-2], -2) for t in (B_t, C_t))
    added = (dt[..., None] * x_t.to(dtype))[..., None] * b[:, :, None]
    state = (dt * A.to(dtype)).exp()[..., None, None] * state.to(dtype) + added
    return _skip_and_gate((state * c[:, :, None]).sum(-1), x_t, D, z), state


def ssd_matrix(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, step: Step) -> Tensor:
    """`onchip.ssd_matrix`."""
    dtype, heads = STATE_DTYPES[B.dtype], dt.shape[-1]
    dt = step(dt.to(dtype))
    b, c = (t.to(dtype).repeat_interleave(heads // t.shape[-2], -2) for t in (B, C))
    decay = _decays((dt * A.to(dtype)).transpose(1, 2))
    return torch.einsum("bihn,bjhn->bhij", c, b) * decay * dt.transpose(1, 2)[:, :, None]
