"""flash-attn 2's functions.

All of them take float32 and float64 too, run on a CPU, and are differentiable through the log-sum-exp and in
`alibi_slopes`, which flash-attn's are not. Two arguments have no effect here on any result, as they have none in
flash-attn on what is computed: `deterministic`, since onchip's gradients have the same bits on every run anyway, and
`max_seqlen` with its kin, from which flash-attn sizes a launch, while onchip reads the longest length in `cu_seqlens`.
"""

import math
from typing import Any, NoReturn

from torch import Tensor

from onchip.integrations.flash_attn._arguments import Window, signed_probabilities, unpack, window
from onchip.ops.attention import attention_with_lse, checks

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`onchip.attention` under flash-attn's name: `softmax(softmax_scale · q kᵀ) v`, causal aligned bottom-right.

    Args:
        q: `(B, Tq, H, D)`.
        k: `(B, Tk, Hk, D)`, H a multiple of Hk.
        v: `(B, Tk, Hk, Dv)`.
        dropout_p: the probability with which each attention probability is dropped, in [0, 1). The seed is drawn from
            PyTorch's default generator, so that `torch.manual_seed` governs it.
        softmax_scale: by default 1/√D.
        causal: query i sees keys j ≤ i + Tk - Tq.
        window_size: `(left, right)`, -1 for no limit: query i sees keys i + Tk - Tq - left ≤ j ≤ i + Tk - Tq + right.
        softcap: bounds the logits; 0 for none.
        alibi_slopes: `(H,)` or `(B, H)`: adds -slope · |i + Tk - Tq - j|.
        deterministic: no effect, as gradients always have the same bits.
        return_attn_probs: return the log-sum-exp too, and with dropout the probabilities, written out.

    Returns:
        `out`, `(B, Tq, H, Dv)` in q's dtype; with `return_attn_probs`, `(out, softmax_lse, S_dmask)`: the natural
        log-sum-exp `(B, H, Tq)`, +inf for a row that sees nothing, and without dropout an empty tensor. With dropout
        S_dmask is the softmax before it, `(B, H, Tq, Tk)`, both lengths padded with zeros to multiples of 128, without
        a gradient; a minus sign marks what was dropped (flash-attn's has another scale in each row).

    Raises:
        ValueError, TypeError: what `onchip.attention` refuses.

    Numerics, cost and source are those of `onchip.attention`.

    >>> import torch
    >>> from onchip.integrations.flash_attn import flash_attn_func
    >>> q, k = torch.randn(2, 5, 8, 16), torch.randn(2, 7, 2, 16)
    >>> out, softmax_lse, _ = flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    >>> out.shape, softmax_lse.shape
    (torch.Size([2, 5, 8, 16]), torch.Size([2, 8, 5]))
    """
    settings = _settings(dropout_p, softmax_scale, causal, window_size, softcap)
    out, lse = attention_with_lse(q, k, v, alibi_slopes=alibi_slopes, **settings)
    if not return_attn_probs:
        return out
    return out, _marked(lse), signed_probabilities(q, k, alibi_slopes, None, **settings)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with k and v in one tensor, `(B, Tk, 2, Hk, D)`, into which their gradients arrive.

    >>> import torch
    >>> from onchip.integrations.flash_attn import flash_attn_kvpacked_func
    >>> flash_attn_kvpacked_func(torch.randn(2, 5, 8, 16), torch.randn(2, 7, 2, 4, 16)).shape
    torch.Size([2, 5, 8, 16])
    """
    k, v = unpack("kv", kv, 2, packed_rows=False)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with q, k and v in one tensor, `(B, T, 3, H, D)`, into which their gradients arrive.

    >>> import torch
    >>> from onchip.integrations.flash_attn import flash_attn_qkvpacked_func
    >>> flash_attn_qkvpacked_func(torch.randn(2, 5, 3, 8, 16), causal=True).shape
    torch.Size([2, 5, 8, 16])
    """
    q, k, v = unpack("qkv", qkv, 3, packed_rows=False)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """`flash_attn_func` for sequences packed one after the other, none of which sees another.

    Args:
        q: `(total_q, H, D)`.
        k: `(total_k, Hk, D)`.
        v: `(total_k, Hk, Dv)`.
        cu_seqlens_q: `(B + 1,)` int32 or int64, from 0 to total_q: sequence b is rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1].
        cu_seqlens_k: the same for k and v.
        max_seqlen_q: no effect, as the lengths are read in cu_seqlens_q.
        max_seqlen_k: no effect, in the same way.
        dropout_p: as for `flash_attn_func`, and so are the other arguments.
        softmax_scale: by default 1/√D.
        causal: aligned at the end of each sequence.
        window_size: aligned in the same way.
        softcap: bounds the logits; 0 for none.
        alibi_slopes: `(H,)` or `(B, H)`.
        deterministic: no effect, as gradients always have the same bits.
        return_attn_probs: return the log-sum-exp too.
        block_table: None. A paged cache raises.

    Returns:
        `out`, `(total_q, H, Dv)`; with `return_attn_probs`, `(out, softmax_lse, S_dmask)` with `(H, total_q)`.

    Raises:
        NotImplementedError: a block table.
        ValueError, TypeError: what `onchip.attention` refuses; so are rows after the last sequence's end.

    >>> import torch
    >>> from onchip.integrations.flash_attn import flash_attn_varlen_func
    >>> q, starts = torch.randn(9, 8, 16), torch.tensor([0, 4, 9], dtype=torch.int32)
    >>> flash_attn_varlen_func(q, q, q, starts, starts, 5, 5, causal=True).shape
    torch.Size([9, 8, 16])
    """
    if block_table is not None:
        raise NotImplementedError(
            "block_table must be None: onchip.attention_with_cache serves key-value caches in pages"
        )
    settings = _settings(dropout_p, softmax_scale, causal, window_size, softcap)
    boundaries = cu_seqlens_q, cu_seqlens_k
    out, lse = attention_with_lse(
        q, k, v, alibi_slopes=alibi_slopes, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **settings
    )
    if not return_attn_probs:
        return out
    return out, _marked(lse), signed_probabilities(q, k, alibi_slopes, boundaries, **settings)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with k and v in one tensor, `(total_k, 2, Hk, D)`.

    >>> import torch
    >>> from onchip.integrations.flash_attn import flash_attn_varlen_kvpacked_func
    >>> q, kv, starts = torch.randn(9, 8, 16), torch.randn(9, 2, 4, 16), torch.tensor([0, 4, 9])
    >>> flash_attn_varlen_kvpacked_func(q, kv, starts, starts, 5, 5).shape
    torch.Size([9, 8, 16])
    """
    k, v = unpack("kv", kv, 2, packed_rows=True)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with q, k and v in one tensor, `(total, 3, H, D)`.

    >>> import torch
    >>> from onchip.integrations.flash_attn import flash_attn_varlen_qkvpacked_func
    >>> flash_attn_varlen_qkvpacked_func(torch.randn(9, 3, 8, 16), torch.tensor([0, 4, 9]), 5).shape
    torch.Size([9, 8, 16])
    """
    q, k, v = unpack("qkv", qkv, 3, packed_rows=True)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> NoReturn:
    """Not served: it is there so that importing it works, and raises NotImplementedError.

    >>> from onchip.integrations.flash_attn import flash_attn_with_kvcache
    >>> flash_attn_with_kvcache(None, None, None)
    Traceback (most recent call last):
    NotImplementedError: flash_attn_with_kvcache is not served here: onchip.attention_with_cache ...
    """
    raise NotImplementedError(
        "flash_attn_with_kvcache is not served here: onchip.attention_with_cache appends to a cache and attends over it"
    )


def _settings(
    dropout_p: float, softmax_scale: float | None, causal: bool, window_size: Window, softcap: float
) -> dict[str, Any]:
    """These arguments under onchip's names, with a seed, so that S_dmask shows what was dropped."""
    dropout_p, seed = checks.dropout(dropout_p, None)
    more = {"dropout_p": dropout_p, "seed": seed}
    return {"scale": softmax_scale, "causal": causal, "window": window(window_size), "softcap": softcap, **more}


def _marked(lse: Tensor) -> Tensor:
    # flash-attn 2 marks a row that sees nothing by +inf, with which its backward's exp(s - lse) is 0.
    return lse.masked_fill(lse == -math.inf, math.inf)
