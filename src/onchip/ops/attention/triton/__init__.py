"""Attention in Triton: the op's implementation for GPUs, forward and backward.

`arguments` says what the kernels are given, `launches` builds each pass. The kernels (`attend`, `gradients`,
`bias_gradient`) are made of parts with one subject each: `schedule` (which tile, which keys), `tiles` (memory),
`scores` (logits and mask), `block_mask`, `softmax`, `dropout`. Every sum has one order: the same bits on every run.
"""

from typing import Any

import torch
from torch import Tensor

from onchip.ops import _triton
from onchip.ops.attention.block_mask import BlockMask
from onchip.ops.attention.outputs import gradients_like, output_like
from onchip.ops.attention.triton import launches
from onchip.ops.attention.triton.arguments import along_time
from onchip.ops.attention.triton.launches import Call, Saved
from onchip.ops.attention.triton.lengths import longest


def forward(*args: Any, batch_invariant: bool = False) -> tuple[Tensor, Tensor]:
    """The op in Triton."""
    call = _call(*args, batch_invariant=batch_invariant)
    out, lse = output_like(call.q, call.k, call.v, call.cu_seqlens_q)
    with _triton.on_device_of(call.q):
        for launch in launches.attend(call, out, lse):
            launch.run()
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *args: Any,
    bias_grad: bool = False,
    slopes_grad: bool = False,
    sinks_grad: bool = False,
) -> tuple[Tensor, ...]:
    """Its derivative in Triton."""
    call = _call(*args)
    optional = zip((call.bias, call.alibi_slopes, call.sinks), (bias_grad, slopes_grad, sinks_grad), strict=True)
    grads = gradients_like((call.q, call.k, call.v), *(x if asked else None for x, asked in optional))
    grad_q, grad_k, grad_v, grad_bias, grad_slopes, grad_sinks = grads
    saved = Saved(along_time(grad_out), lse, torch.empty_like(lse))
    slopes_by_row = torch.empty_like(lse) if slopes_grad else None
    with _triton.on_device_of(call.q):
        launches.deltas(call, along_time(out), saved.grad_out, grad_lse, saved.delta).run()
        launches.keys_and_values(call, saved, grad_k, grad_v).run()
        launches.queries(call, saved, grad_q, slopes_by_row).run()
        if bias_grad:
            grad_bias.copy_(_bias_gradient(call, saved).view_as(grad_bias))
    if slopes_by_row is not None:
        grad_slopes.copy_(_slopes_gradient(call, slopes_by_row))
    if sinks_grad:
        grad_sinks.copy_(_sinks_gradient(call, saved))
    return grads


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    block_mask: list[Tensor] | None = None,
    mask_shape: list[int] | None = None,
    *,
    batch_invariant: bool = False,
) -> Call:
    """The op's arguments, of which the first are the op's own and the defaulted ones may be missing."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        lengths = q.shape[1], k.shape[1]
    else:
        lengths = longest(q, k, bias, cu_seqlens_q, cu_seqlens_k, mask_shape)
    q, k, v = along_time(q), along_time(k), along_time(v)
    settings = (left, right, scale, softcap, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k)
    mask = None if block_mask is None or mask_shape is None else BlockMask.of_tensors(block_mask, mask_shape)
    return Call(q, k, v, *settings, lengths, _triton.architecture(q.device), dropout_p, seed, mask, batch_invariant)


def _bias_gradient(call: Call, saved: Saved) -> Tensor:
    """In float32 and four dimensions.

    A bias with all queries and keys is summed over batch and heads in the kernel, as a gradient for each would not fit;
    any other is computed for each sequence and head and then summed.
    """
    assert call.bias is not None
    shape = (1,) * (4 - call.bias.ndim) + call.bias.shape
    per_key = shape[3] != 1
    per_query = shape[2] != 1 or not per_key
    own = shape[:2] if per_query and per_key else (call.batch, call.heads)
    tq, tk = call.longest
    grad = torch.empty((*own, tq if per_query else 1, tk if per_key else 1), dtype=torch.float32, device=call.q.device)
    launches.bias(call, saved, grad, per_query=per_query, per_key=per_key).run()
    return grad.sum_to_size(shape)


def _slopes_gradient(call: Call, by_row: Tensor) -> Tensor:
    """What each row gives, summed over time, and over sequences where they share the slopes."""
    assert call.alibi_slopes is not None
    by_row = by_row.double()
    if call.alibi_slopes.ndim == 1:
        return by_row.sum(-1) if call.cu_seqlens_q is not None else by_row.sum((0, 2))
    if call.cu_seqlens_q is None:
        return by_row.sum(-1)
    return torch.segment_reduce(by_row.T.contiguous(), "sum", lengths=call.cu_seqlens_q.diff(), unsafe=True)


def _sinks_gradient(call: Call, saved: Saved) -> Tensor:
    """Minus the sink's probability times delta, summed over rows: the sink gives no value."""
    assert call.sinks is not None
    lse = saved.lse.double()
    p = torch.exp(call.sinks.double()[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
    by_row = -p * saved.delta
    return by_row.sum(-1) if call.cu_seqlens_q is not None else by_row.sum((0, 2))
