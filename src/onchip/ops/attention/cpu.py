"""Attention on the native CPU kernels (native/attention): the op's CPU implementation, forward and backward.

The kernels take any strides, head dims to 512, and all that `onchip.attention` offers. They pack tiles of keys, keep a
block of scores in cache, and write nothing of size T×T; 16-bit inputs are widened as they are packed.
"""

import torch
from torch import Tensor

from onchip.ops import _native
from onchip.ops.attention import checks
from onchip.ops.attention.outputs import gradients_like, output_like

MAX_HEAD_DIM = 512

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.bool: 4}
_Described = tuple[int, int, int, int, int, int]


def limits(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the native kernels cannot serve this call, or None."""
    if _native.missing is not None:
        return _native.missing
    if q.size(-1) > MAX_HEAD_DIM or v.size(-1) > MAX_HEAD_DIM:
        return f"head dims go to {MAX_HEAD_DIM}, got {q.shape[-1]} for q and k, {v.shape[-1]} for v"
    return None


def forward(
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
) -> tuple[Tensor, Tensor]:
    """The op on the CPU."""
    starts = _starts(q, k, bias, cu_seqlens_q, cu_seqlens_k, mask_shape)
    out, lse = output_like(q, k, v, cu_seqlens_q)
    tensors, _kept = describe_inputs(q, k, v, out, lse, bias, alibi_slopes, sinks)
    sizes, settings = (*_sizes(q, k, v, left, right, starts), batch_invariant), (scale, softcap, dropout_p)
    _native.kernels.attention_forward(sizes, settings, seed, *starts, tensors, _mask(block_mask))
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
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
    bias_grad: bool = False,
    slopes_grad: bool = False,
    sinks_grad: bool = False,
) -> tuple[Tensor, ...]:
    """Its derivative on the CPU."""
    starts = _starts(q, k, bias, cu_seqlens_q, cu_seqlens_k, mask_shape)
    tensors, _kept = describe_inputs(q, k, v, out, lse, bias, alibi_slopes, sinks)
    grads = gradients_like(
        (q, k, v), bias if bias_grad else None, alibi_slopes if slopes_grad else None, sinks if sinks_grad else None
    )
    grad_q, grad_k, grad_v, grad_bias, grad_slopes, grad_sinks = grads
    batch = len(starts[0]) - 1 if starts[0] else q.shape[0]
    per_head = torch.zeros(2, batch, q.shape[-2], dtype=torch.float64)  # slopes' and sinks' sums
    bias_shape = (1,) * (4 - grad_bias.ndim) + tuple(grad_bias.shape)
    if bias_grad and batch == 0:
        grad_bias.zero_()  # no sequence will write it
    grad_lse = None if grad_lse is None else grad_lse.to(lse.dtype)
    gradients = (
        describe_rows(grad_out),
        None if grad_lse is None else _lse(grad_lse),
        describe_rows(grad_q),
        describe_rows(grad_k),
        describe_rows(grad_v),
        _broadcast(grad_bias, bias_shape) if bias_grad else None,
        describe_table(per_head[0]) if slopes_grad else None,
        describe_table(per_head[1]) if sinks_grad else None,
    )
    sizes, settings = (*_sizes(q, k, v, left, right, starts), False), (scale, softcap, dropout_p)
    mask = _mask(block_mask)
    _native.kernels.attention_backward(sizes, settings, seed, *starts, tensors, mask, gradients, bias_shape)
    if slopes_grad:
        grad_slopes.copy_(per_head[0] if grad_slopes.ndim == 2 else per_head[0].sum(0))
    if sinks_grad:
        grad_sinks.copy_(per_head[1].sum(0))
    return grads


def _starts(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    mask_shape: list[int] | None,
) -> tuple[list[int], list[int]]:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return [], []
    checks.check_lengths(q, k, bias, cu_seqlens_q, cu_seqlens_k, mask_shape)
    return cu_seqlens_q.tolist(), cu_seqlens_k.tolist()


def _sizes(
    q: Tensor, k: Tensor, v: Tensor, left: int, right: int, starts: tuple[list[int], list[int]]
) -> tuple[int, ...]:
    (*rows, heads, head_dim), (*_, tk, kv_heads, value_dim) = q.shape, v.shape
    batch, tq = rows if len(rows) == 2 else (len(starts[0]) - 1, 0)  # packed, lengths come with the boundaries
    return (batch, tq, tk, heads, kv_heads, head_dim, value_dim, left, right, torch.get_num_threads())


def _mask(block_mask: list[Tensor] | None) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Sizes and addresses of `BlockMask.tensors`."""
    if block_mask is None:
        return None
    by_query, _, by_key, _, bits = block_mask
    batch, heads, rows = by_query.shape
    return (bits.shape[1], batch, heads, rows - 1, by_key.shape[2] - 1), tuple(x.data_ptr() for x in block_mask)


def describe_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple[tuple[_Described | None, ...], tuple[Tensor | None, ...]]:
    """The tensors as the kernels take them, and the copies that must outlive the call."""
    slopes = None if alibi_slopes is None else alibi_slopes.to(lse.dtype)
    sinks = None if sinks is None else sinks.to(lse.dtype)
    described = (
        describe_rows(q),
        describe_rows(k),
        describe_rows(v),
        describe_rows(out),
        _lse(lse),
        None if bias is None else _broadcast(bias, (1,) * (4 - bias.ndim) + tuple(bias.shape)),
        None if slopes is None else describe_table(slopes),
        None if sinks is None else (sinks.data_ptr(), _DTYPES[sinks.dtype], sinks.stride(0), 0, 0, 0),
    )
    return described, (slopes, sinks)


def describe_rows(x: Tensor) -> _Described:
    """(B, T, H, D), or (total, H, D) as a batch of one."""
    strides = x.stride() if x.ndim == 4 else (0, *x.stride())
    return (x.data_ptr(), _DTYPES[x.dtype], *strides)  # type: ignore[return-value]


def _lse(x: Tensor) -> _Described:
    """(B, H, T), or (H, total) as a batch of one."""
    strides = x.stride() if x.ndim == 3 else (0, *x.stride())
    return (x.data_ptr(), _DTYPES[x.dtype], *strides, 0)  # type: ignore[return-value]


def describe_table(x: Tensor) -> _Described:
    """(B, H), or (H,) for every sequence."""
    strides = x.stride() if x.ndim == 2 else (0, *x.stride())
    return (x.data_ptr(), _DTYPES[x.dtype], *strides, 0, 0)  # type: ignore[return-value]


def _broadcast(x: Tensor, shape: tuple[int, ...]) -> _Described:
    """Any shape broadcastable to four dimensions: stride 0 where there is one element for all."""
    strides = (0,) * (4 - x.ndim) + x.stride()
    strides = tuple(0 if n == 1 else stride for n, stride in zip(shape, strides, strict=True))
    return (x.data_ptr(), _DTYPES[x.dtype], *strides)  # type: ignore[return-value]
