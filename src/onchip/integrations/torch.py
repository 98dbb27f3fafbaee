"""PyTorch's `scaled_dot_product_attention`, and existing calls to it, computed by onchip.

>>> import torch, torch.nn.functional as F
>>> from onchip.integrations.torch import sdpa_through_onchip
>>> q, k, v = torch.randn(3, 2, 4, 10, 16).unbind(0)
>>> with sdpa_through_onchip():
...     F.scaled_dot_product_attention(q, k, v, is_causal=True).shape
torch.Size([2, 4, 10, 16])
"""

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from onchip.ops.attention import attention

__all__ = ["scaled_dot_product_attention", "sdpa_through_onchip"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, in its layout and meaning, computed by `onchip.attention`.

    Args:
        query: `(…, H, L, E)`; float64, float32, bfloat16 or float16. Without the heads, `(L, E)`, too.
        key: `(…, Hk, S, E)`; dimensions before S broadcast with the others'.
        value: `(…, Hk, S, Ev)`.
        attn_mask: broadcastable to `(…, H, L, S)`; boolean (True = attend) or floating (added), into which a gradient
            flows; or a `CausalBias` from `torch.nn.attention.bias`.
        dropout_p: the probability with which each attention probability is dropped. The seed is drawn from PyTorch's
            default generator for the CPU, so that `torch.manual_seed` governs it; what is dropped differs from PyTorch.
        is_causal: query i sees keys j ≤ i: aligned top-left, where onchip's own `causal` is aligned bottom-right. With
            `attn_mask`, what both let through, as in PyTorch's CPU kernel.
        scale: by default 1/√E.
        enable_gqa: H may be a multiple of Hk.

    Returns:
        `(…, H, L, Ev)`, a view of `(…, L, H, Ev)`. A row that sees nothing is zero, as in PyTorch's.

    Raises:
        NotImplementedError: nested tensors.
        ValueError, TypeError: shapes, dtypes and devices that do not fit.

    Numerics, cost and source are those of `onchip.attention`. Nothing is copied, unless several dimensions before the
    heads cannot be seen as one. No mask is made for `is_causal`.

    >>> import torch
    >>> q, k, v = torch.randn(3, 2, 4, 10, 16).unbind(0)
    >>> want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    >>> torch.allclose(scaled_dot_product_attention(q, k, v), want, atol=1e-5)
    True
    """
    if reason := _refusal(query, key, value, attn_mask):
        raise NotImplementedError(f"scaled_dot_product_attention: onchip cannot serve this call: {reason}")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be True or False, got {is_causal!r}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
    batch, heads = _leading(query, key, value, enable_gqa)
    q, k, v = (_in_our_layout(x, batch, n) for x, n in zip((query, key, value), heads, strict=True))
    tq, tk = q.shape[1], k.shape[1]
    ends_together = False
    if _is_causal_bias(attn_mask):
        is_causal, ends_together = _causal_bias(cast(Tensor, attn_mask), is_causal, tq, tk)
        attn_mask = None
    bias = None if attn_mask is None else _mask(attn_mask, batch, (q.shape[2], tq, tk))
    window = None
    if is_causal and not ends_together:
        # Keys after the last query are seen by none. Then each query's own key lies tq - tk ahead of where a mask that
        # is aligned at the ends puts it.
        k, v = k[:, :tq], v[:, :tq]
        bias = None if bias is None else bias[..., :tq]
        window = (None, max(tq - tk, 0))
    p = dropout_p if dropout_p < 1.0 else 0.0
    out = attention(q, k, v, causal=ends_together, window=window, scale=scale, bias=bias, dropout_p=p).transpose(1, 2)
    out = out if dropout_p < 1.0 else 0.0 * out
    out = out if len(batch) == 1 else out.reshape(*batch, *out.shape[1:])
    return out.squeeze(0) if query.ndim == key.ndim == value.ndim == 2 else out


def sdpa_through_onchip(*, fallback: bool = False) -> AbstractContextManager[object]:
    """A context in which calls to `torch.nn.functional.scaled_dot_product_attention` run through onchip.

    Also those inside `nn.MultiheadAttention` and `nn.TransformerEncoderLayer`, which take their slow path in it; with
    `need_weights=True`, MultiheadAttention makes no such call, and nothing changes. It holds for the thread that
    entered it. Within, every call of a function of PyTorch costs about a microsecond more of Python.

    Args:
        fallback: let PyTorch run what onchip cannot serve, nested tensors, with a warning that says why; by default
            that raises NotImplementedError.

    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    >>> with sdpa_through_onchip():
    ...     layer(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """
    return _ThroughOnchip(fallback)


class _ThroughOnchip(TorchFunctionMode):
    def __init__(self, fallback: bool) -> None:
        super().__init__()
        self.fallback = fallback

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            func = self.attend
        elif func is F.multi_head_attention_forward:
            # What it calls itself does not come here, as the mode is off while one of its calls is served.
            func = _with_attention(self.attend)
        return func(*args, **(kwargs or {}))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ) -> Tensor:
        if self.fallback and (reason := _refusal(query, key, value, attn_mask)):
            warnings.warn(f"scaled_dot_product_attention runs in PyTorch: {reason}", stacklevel=2)
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **more)
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **more)


def _with_attention(attend: Callable[..., Tensor]) -> Callable[..., Any]:
    """PyTorch's multi-head attention with `attend` in the place of `scaled_dot_product_attention`."""
    theirs = F.multi_head_attention_forward
    names = vars(F) | {"scaled_dot_product_attention": attend, "has_torch_function": lambda tensors: False}
    ours = FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__, theirs.__closure__)
    ours.__kwdefaults__ = theirs.__kwdefaults__
    return ours


def _refusal(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> str | None:
    """Why onchip cannot serve a call that PyTorch can, or None."""
    if any(isinstance(x, Tensor) and x.is_nested for x in (query, key, value, attn_mask)):
        return "a tensor is nested; onchip.attention takes sequences of different lengths with cu_seqlens_q"
    return None


def _leading(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dimensions before the heads, broadcast, and the heads of query, key and value; the shapes fit each other."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim < 2:
            raise ValueError(f"{name} must have at least 2 dimensions, (…, time, dim), got shape {tuple(x.shape)}")
    shapes = q, k, v = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    got = "query {}, key {}, value {}"
    if k[-1] != q[-1] or v[-2] != k[-2]:
        raise ValueError(
            f"key must have query's last dimension, and value key's last but one, got {got.format(*shapes)}"
        )
    heads = tuple(shape[-3] if len(shape) > 2 else 1 for shape in shapes)
    try:
        batch = _broadcast(q[:-3], k[:-3], v[:-3])
        return batch, heads if enable_gqa else _broadcast(*((n,) for n in heads)) * 3
    except RuntimeError:
        hint = "" if enable_gqa else "; enable_gqa=True lets key heads serve several query heads"
        raise ValueError(
            f"dimensions before the last two must be broadcastable, got {got.format(*shapes)}{hint}"
        ) from None


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    # PyTorch's function takes longer than the rest of a call, and shapes are seldom different.
    if all(shape == shapes[0] for shape in shapes):
        return shapes[0]
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def _in_our_layout(x: Tensor, batch: tuple[int, ...], heads: int) -> Tensor:
    """x as (batch, time, heads, dim), a view where its strides allow."""
    shape = (*batch, heads, *x.shape[-2:])
    x = x if x.shape == shape else x.expand(shape)
    x = x if len(batch) == 1 else x.reshape(math.prod(batch), *shape[-3:])
    return x.transpose(1, 2)


def _mask(attn_mask: Tensor, batch: tuple[int, ...], shape: tuple[int, int, int]) -> Tensor:
    """attn_mask with at most one dimension before the heads."""
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor, got {type(attn_mask).__name__}")
    full = (*batch, *shape)
    missing = len(full) - attn_mask.ndim
    if (
        attn_mask.ndim < 2
        or missing < 0
        or any(n not in (1, m) for n, m in zip(attn_mask.shape, full[missing:], strict=True))
    ):
        raise ValueError(
            f"attn_mask must have 2 dimensions or more, broadcastable to {full}, got shape {tuple(attn_mask.shape)}"
        )
    if attn_mask.ndim <= 3 or len(batch) == 1:
        return attn_mask
    return attn_mask.expand(*batch, *attn_mask.shape[-3:]).reshape(math.prod(batch), *attn_mask.shape[-3:])


def _is_causal_bias(attn_mask: Tensor | None) -> bool:
    # By name: its module imports PyTorch's compiler, which takes seconds, and is loaded only where one was made.
    return type(attn_mask).__name__ == "CausalBias"


def _causal_bias(attn_mask: Any, is_causal: bool, tq: int, tk: int) -> tuple[bool, bool]:
    """Whether the bias is aligned top-left, and whether bottom-right."""
    if is_causal:
        raise ValueError("is_causal must be False where attn_mask is a CausalBias")
    if (attn_mask.seq_len_q, attn_mask.seq_len_kv) != (tq, tk):
        raise ValueError(
            f"attn_mask must be a CausalBias for lengths {tq} and {tk}, got one for {attn_mask.seq_len_q} and "
            f"{attn_mask.seq_len_kv}"
        )
    lower_right = attn_mask.variant.name == "LOWER_RIGHT"
    return not lower_right, lower_right
