"""What every implementation of attention writes its results into."""

import torch
from torch import Tensor


def output_like(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None) -> tuple[Tensor, Tensor]:
    """Uninitialised `out` and `lse` for a call."""
    *batch, time, heads, head_dim = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty((*batch, heads, time), dtype=dtype)
    if v.shape[-1] == head_dim and q.is_contiguous():
        return torch.empty_like(q), lse  # costs a third of new_empty, and this is the price of every small call
    return q.new_empty((*batch, time, heads, v.shape[-1])), lse


def gradients_like(
    inputs: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, ...]:
    """Uninitialised gradients, contiguous; a gradient nobody asked for (its input given as None) has no elements."""
    optional = (inputs[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in (bias, alibi_slopes, sinks))
    return (*(x.new_empty(x.shape) for x in inputs), *optional)
