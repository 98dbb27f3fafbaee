"""flash-attn 2's functions.

All of them take float32 and float64 too, run on a CPU, and are differentiable through the log-sum-exp and in
`alibi_slopes`, which flash-attn's are not. Two arguments have no effect here on any result, as they have none in
flash-attn on what is computed: `deterministic`, since onchip's gradients have the same bits on every run anyway, and
`max_seqlen` with its kin, from which flash-attn sizes a launch, while onchip reads the longest length in `cu_seqlens`.
"""

import math
from typing import Any

from torch import Tensor

from onchip.integrations.flash_attn._arguments import Window, signed_probabilities, unpack, window
from onchip.integrations.flash_attn._cache import cache_of, rotary_tables
from onchip.integrations.flash_attn._ragged import attend, check_boundaries, rows_of
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
        k: `(total_k, Hk, D)`; with `block_table` `(pages, page size, Hk, D)`.
        v: `(total_k, Hk, Dv)`, or `(pages, page size, Hk, Dv)`.
        cu_seqlens_q: `(B + 1,)` int32 or int64, from 0 to total_q: sequence b is rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1].
        cu_seqlens_k: the same for k and v; with `block_table` only its differences count, the rows' lengths.
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
        block_table: `(B, pages of a row)` int32: key n of sequence b is in page block_table[b, n // page size]. Then
            there is no gradient, and queries are put into a rectangle as long as the longest of them.

    Returns:
        `out`, `(total_q, H, Dv)`; with `return_attn_probs`, `(out, softmax_lse, S_dmask)` with `(H, total_q)`.

    Raises:
        NotImplementedError: dropout with a block table.
        ValueError, TypeError: what `onchip.attention` refuses; so are rows after the last sequence's end.

    >>> import torch
    >>> from onchip.integrations.flash_attn import flash_attn_varlen_func
    >>> q, starts = torch.randn(9, 8, 16), torch.tensor([0, 4, 9], dtype=torch.int32)
    >>> flash_attn_varlen_func(q, q, q, starts, starts, 5, 5, causal=True).shape
    torch.Size([9, 8, 16])
    """
    settings = _settings(dropout_p, softmax_scale, causal, window_size, softcap)
    if block_table is not None:
        out, lse = _paged(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, alibi_slopes, settings)
        return (out, _marked(lse), q.new_empty(0)) if return_attn_probs else out
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
) -> Tensor | tuple[Tensor, Tensor]:
    """`onchip.attention_with_cache` under flash-attn's name: new queries over a cache, to which keys may be added.

    Args:
        q: `(B, Tq, H, D)`.
        k_cache: `(rows, capacity, Hk, D)`, of which the first B rows are used unless `cache_batch_idx` says otherwise;
            with `block_table` `(pages, page size, Hk, D)`, of any page size. Written to where k is given.
        v_cache: the same with head dim Dv.
        k: `(B, Tn, Hk, D)`, appended behind each row's keys.
        v: `(B, Tn, Hk, Dv)`.
        rotary_cos: `(positions, n)`, 2n ≤ D: turns k by positions cache_seqlens, cache_seqlens + 1, …, and q likewise
            where it is causal or has a window, else all of q by cache_seqlens. Needs k and v.
        rotary_sin: the sines.
        cache_seqlens: `(B,)`, or one number for all: how many keys a row held before. By default all it has room for.
        cache_batch_idx: `(B,)` integers: which rows of the cache these are; not with `block_table`.
        cache_leftpad: `(B,)` integers: how many of a row's first places hold no key; they count in cache_seqlens.
        block_table: `(B, pages of a row)` int32.
        softmax_scale: by default 1/√D.
        causal: aligned at the last query and the last key, those added included.
        window_size: aligned in the same way; -1 for no limit.
        softcap: bounds the logits; 0 for none.
        rotary_interleaved: pairs of features are neighbours, else (i, i + n).
        alibi_slopes: `(H,)` or `(B, H)`.
        num_splits: no effect: in how many parts the keys are read decides only how a GPU is used.
        return_softmax_lse: return the log-sum-exp too.

    Returns:
        `out`, `(B, Tq, H, Dv)` in q's dtype; with `return_softmax_lse`, `(out, softmax_lse)` with `(B, H, Tq)`, +inf
        for a row that sees nothing.

    Raises:
        ValueError, TypeError: what `onchip.attention_with_cache` refuses; nothing is written then.
        RuntimeError: a gradient is asked for, which flash-attn drops silently.

    >>> import torch
    >>> from onchip.integrations.flash_attn import flash_attn_with_kvcache
    >>> q, k, v = torch.randn(3, 2, 1, 4, 16)
    >>> k_cache, v_cache = torch.zeros(2, 2, 10, 4, 16)
    >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=3, causal=True).shape
    torch.Size([2, 1, 4, 16])
    >>> torch.equal(k_cache[:, 3], k[:, 0])
    True
    """
    places = cache_batch_idx, cache_leftpad, ("block_table", block_table)
    cache = cache_of(len(q), k_cache, v_cache, cache_seqlens, *places, appends=k is not None)
    out, lse = cache.attend(
        q,
        k=k,
        v=v,
        rotary=rotary_tables(rotary_cos, rotary_sin),
        rotary_interleaved=rotary_interleaved,
        causal=causal,
        window=window(window_size),
        scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )
    return (out, _marked(lse)) if return_softmax_lse else out


def _paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_table: Tensor,
    alibi_slopes: Tensor | None,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Packed queries over keys in pages."""
    dropout_p = settings.pop("dropout_p")
    if settings.pop("seed") or dropout_p:
        raise NotImplementedError(f"dropout_p must be 0 where block_table is given, got {dropout_p}")
    queries = rows_of("cu_seqlens_q", cu_seqlens_q, len(q))
    check_boundaries("cu_seqlens_k", cu_seqlens_k)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(f"cu_seqlens_k must have cu_seqlens_q's length {len(cu_seqlens_q)}, got {len(cu_seqlens_k)}")
    places = None, None, ("block_table", block_table)
    cache = cache_of(len(queries.lengths), k, v, cu_seqlens_k.diff(), *places, appends=False)
    return attend(q, queries, cache, None, None, None, alibi_slopes=alibi_slopes, **settings)


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
