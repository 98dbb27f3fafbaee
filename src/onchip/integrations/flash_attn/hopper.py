"""FlashAttention-3's functions, as its hopper/flash_attn_interface.py has them.

They take what flash-attn 2's take here, and run on any device that onchip runs on. Five arguments decide only how a GPU
is used, not what is computed, and have no effect: `num_splits` (into how many parts the keys are split), `pack_gqa`
(whether the query heads of a key head share a tile), `sm_margin` (how many multiprocessors are left to others),
`scheduler_metadata` (which of them does what) and `deterministic`, as gradients always have the same bits. A row that
sees nothing has lse = -inf.
"""

import math

import torch
from torch import Tensor

from onchip.integrations.flash_attn._arguments import Window, unpack, window
from onchip.integrations.flash_attn._cache import cache_of, rotary_tables
from onchip.integrations.flash_attn._ragged import Rotary, attend_in_layout, rows_of, used_rows
from onchip.ops.attention import attention_with_lse
from onchip.ops.merge_attention import merge_attention

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]

Result = Tensor | tuple[Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """`onchip.attention` under FlashAttention-3's name: `softmax(softmax_scale · (q kᵀ + qv vᵀ)) v`.

    Args:
        q: `(B, Tq, H, D)`.
        k: `(B, Tk, Hk, D)`, H a multiple of Hk.
        v: `(B, Tk, Hk, Dv)`.
        softmax_scale: by default 1/√D, with qv 1/√(D + Dv).
        causal: query i sees keys j ≤ i + Tk - Tq.
        qv: `(B, Tq, H, Dv)`, what meets v in the logits (multi-head latent attention). q and qv, and k and v, are put
            side by side for it, which copies them.
        q_descale: `(B, Hk)`, the factor of q where q, k and v are float8_e4m3fn, 1 by default. Then q, k and v are
            taken out of eight bits exactly, the arithmetic is float32, where FlashAttention-3 rounds probabilities to
            eight bits, and the result is bfloat16.
        k_descale: k's factor.
        v_descale: v's factor.
        window_size: `(left, right)`, -1 for no limit.
        attention_chunk: 0. Anything else raises.
        softcap: bounds the logits; 0 for none.
        num_splits: no effect, like `pack_gqa`, `deterministic` and `sm_margin`: see the module.
        pack_gqa: no effect.
        deterministic: no effect.
        sm_margin: no effect.
        return_attn_probs: return the log-sum-exp too.

    Returns:
        `out`, `(B, Tq, H, Dv)`; with `return_attn_probs`, `(out, softmax_lse)`: the natural log-sum-exp `(B, H, Tq)`.

    Raises:
        NotImplementedError: attention_chunk.
        ValueError, TypeError: what `onchip.attention` refuses; a descale where nothing is in eight bits.

    >>> import torch
    >>> from onchip.integrations.flash_attn import hopper
    >>> q, k = torch.randn(2, 5, 8, 16), torch.randn(2, 7, 2, 16)
    >>> hopper.flash_attn_func(q, k, k, causal=True, num_splits=4).shape
    torch.Size([2, 5, 8, 16])
    """
    return _attend(
        (q, k, v),
        (q_descale, k_descale, v_descale),
        qv,
        softmax_scale,
        causal,
        window_size,
        attention_chunk,
        softcap,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with q, k and v in one tensor, into which their gradients arrive.

    qkv is `(B, T, 3, H, D)`, or `(B, T, num_heads_q + 2·Hk, D)` with num_heads_q given.

    >>> import torch
    >>> from onchip.integrations.flash_attn import hopper
    >>> hopper.flash_attn_qkvpacked_func(torch.randn(2, 5, 8, 16), causal=True, num_heads_q=4).shape
    torch.Size([2, 5, 4, 16])
    """
    if num_heads_q is None:
        q, k, v = unpack("qkv", qkv, 3, packed_rows=False)
    else:
        heads = qkv.shape[-2] - num_heads_q
        if qkv.ndim != 4 or num_heads_q < 1 or heads < 2 or heads % 2:
            raise ValueError(
                "qkv must have shape (batch, time, num_heads_q + 2 · key heads, dim), as num_heads_q is given, "
                f"got {tuple(qkv.shape)} with num_heads_q={num_heads_q}"
            )
        q, k, v = torch.split(qkv, [num_heads_q, heads // 2, heads // 2], dim=-2)
    return _attend(
        (q, k, v),
        (q_descale, k_descale, v_descale),
        None,
        softmax_scale,
        causal,
        window_size,
        attention_chunk,
        softcap,
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
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` for packed sequences: q `(total_q, H, D)`, k and v `(total_k, Hk, D)`, boundaries `(B + 1,)`.

    max_seqlen_q and max_seqlen_k have no effect, as the lengths are read in the boundaries. With seqused_q or
    seqused_k, `(B,)` integers, only so many of the first rows of each sequence are there; they are copied. Queries that
    are not have zeros and -inf, where FlashAttention-3 writes nothing. What is not used has zero gradients.

    >>> import torch
    >>> from onchip.integrations.flash_attn import hopper
    >>> q, starts = torch.randn(9, 8, 16), torch.tensor([0, 4, 9], dtype=torch.int32)
    >>> hopper.flash_attn_varlen_func(q, q, q, starts, starts, 5, 5, causal=True).shape
    torch.Size([9, 8, 16])
    """
    return _attend(
        (q, k, v),
        (q_descale, k_descale, v_descale),
        qv,
        softmax_scale,
        causal,
        window_size,
        attention_chunk,
        softcap,
        return_attn_probs,
        (cu_seqlens_q, cu_seqlens_k),
        (seqused_q, seqused_k),
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
    """`onchip.attention_with_cache` under FlashAttention-3's name: flash-attn 2's function of this name, and more.

    Args:
        q: `(B, Tq, H, D)`, or with `cu_seqlens_q` `(total_q, H, D)`.
        k_cache: `(rows, capacity, Hk, D)`, or with `page_table` `(pages, page size, Hk, D)`.
        v_cache: the same with head dim Dv.
        k: `(B, Tn, Hk, D)`, or with `cu_seqlens_k_new` `(total_new, Hk, D)`, appended behind each row's keys.
        v: the same with head dim Dv.
        qv: `(B, Tq, H, Dv)` or `(total_q, H, Dv)`, what meets v in the logits. The cache is copied for it.
        rotary_cos: `(positions, n)`, as in flash-attn 2.
        rotary_sin: the sines.
        cache_seqlens: `(B,)`, or one number for all: how many keys a row held before. By default all it has room for.
        cache_batch_idx: `(B,)` integers: which rows of the cache these are; not with `page_table`.
        cache_leftpad: `(B,)` integers: how many of a row's first places hold no key; they count in cache_seqlens.
        page_table: `(B, pages of a row)` int32.
        cu_seqlens_q: `(B + 1,)` integers: each row has its own number of queries. They are put into a rectangle as long
            as the longest of them, so a batch of one long row and many short ones is better split in two calls.
        cu_seqlens_k_new: `(B + 1,)` integers: each row has its own number of new keys.
        max_seqlen_q: no effect, as the lengths are read in `cu_seqlens_q`.
        rotary_seqlens: `(B,)` integers: the position at which each row's new tokens begin, by default cache_seqlens.
        q_descale: None. Caches of eight bits raise, and so do `k_descale` and `v_descale`.
        k_descale: None.
        v_descale: None.
        softmax_scale: by default 1/√D, with qv 1/√(D + Dv).
        causal: aligned at the last query and the last key, those added included.
        window_size: aligned in the same way; -1 for no limit.
        attention_chunk: 0. Anything else raises.
        softcap: bounds the logits; 0 for none.
        rotary_interleaved: pairs of features are neighbours, else (i, i + n).
        scheduler_metadata: no effect, like `num_splits`, `pack_gqa` and `sm_margin`: see the module.
        num_splits: no effect.
        pack_gqa: no effect.
        sm_margin: no effect.
        return_softmax_lse: return the log-sum-exp too.

    Returns:
        `out` in q's layout; with `return_softmax_lse`, as FlashAttention-3 does, four tensors: `out`, `softmax_lse`
        `(B, H, Tq)` or `(H, total_q)`, and the parts' results before they were merged, which here are empty.

    Raises:
        NotImplementedError: attention_chunk or a descale.
        ValueError, TypeError: what `onchip.attention_with_cache` refuses; nothing is written then.
        RuntimeError: a gradient is asked for.

    >>> import torch
    >>> from onchip.integrations.flash_attn import hopper
    >>> q, (k_cache, v_cache) = torch.randn(5, 8, 16), torch.randn(2, 2, 10, 2, 16)
    >>> starts = torch.tensor([0, 1, 5], dtype=torch.int32)
    >>> hopper.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=10, cu_seqlens_q=starts, causal=True).shape
    torch.Size([5, 8, 16])
    """
    _check_chunk(attention_chunk)
    for name, descale in (("q_descale", q_descale), ("k_descale", k_descale), ("v_descale", v_descale)):
        if descale is not None:
            raise NotImplementedError(f"{name} must be None: onchip.attention_with_cache has no caches of eight bits")
    batch = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    places = cache_batch_idx, cache_leftpad, ("page_table", page_table)
    cache = cache_of(batch, k_cache, v_cache, cache_seqlens, *places, appends=k is not None)
    tables = rotary_tables(rotary_cos, rotary_sin)
    if rotary_seqlens is not None and tables is None:
        raise ValueError("rotary_cos and rotary_sin must be given where rotary_seqlens is")
    settings = {"scale": softmax_scale, "causal": causal, "window": window(window_size), "softcap": softcap}
    if qv is None and cu_seqlens_q is None and cu_seqlens_k_new is None:
        turns = {"rotary": tables, "rotary_seqlens": rotary_seqlens, "rotary_interleaved": rotary_interleaved}
        out, lse = cache.attend(q, k=k, v=v, **turns, **settings)
    else:
        begins = cache.lengths if rotary_seqlens is None else rotary_seqlens
        rotary = None if tables is None else Rotary(tables, rotary_interleaved, begins)
        out, lse = attend_in_layout(q, cu_seqlens_q, cache, k, v, cu_seqlens_k_new, qv, rotary, settings)
    return (out, lse, out.new_empty(0), lse.new_empty(0)) if return_softmax_lse else out


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`onchip.merge_attention` under FlashAttention-3's name: attention over parts of the keys, merged.

    Args:
        out_partial: `(parts, B, T, H, Dv)`; or without B.
        lse_partial: `(parts, B, T, H)`, natural; mind that heads come last here.
        out: where the result is written to, as it is returned.
        out_dtype: the result's, by default out's, else out_partial's.

    Returns:
        `out` `(B, T, H, Dv)` and the log-sum-exp `(B, T, H)`.

    Differentiable where `out` is not given.

    >>> import torch
    >>> from onchip.integrations.flash_attn import hopper
    >>> out, lse = hopper.flash_attn_combine(torch.randn(3, 2, 5, 4, 8), torch.randn(3, 2, 5, 4))
    >>> out.shape, lse.shape
    (torch.Size([2, 5, 4, 8]), torch.Size([2, 5, 4]))
    """
    dtype = out_dtype or (out_partial.dtype if out is None else out.dtype)
    wide = out_partial.to(torch.promote_types(out_partial.dtype, dtype))
    merged, lse = merge_attention(wide, lse_partial.transpose(-1, -2))
    merged = merged.to(dtype)
    if out is not None:
        if out.shape != merged.shape or out.dtype != dtype:
            raise ValueError(
                f"out must have shape {tuple(merged.shape)} and out_dtype {dtype}, got {tuple(out.shape)}, {out.dtype}"
            )
        merged = out.copy_(merged)
    return merged, lse.transpose(-1, -2)


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """An empty plan, which `flash_attn_with_kvcache` takes: onchip has nothing to plan ahead of a call.

    >>> import torch
    >>> from onchip.integrations.flash_attn import hopper
    >>> hopper.get_scheduler_metadata(1, 1, 9, 4, 2, 64, torch.tensor([9])).shape
    torch.Size([0])
    """
    return torch.empty(0, dtype=torch.int32, device=cache_seqlens.device)


def _attend(
    qkv: tuple[Tensor, Tensor, Tensor],
    descales: tuple[Tensor | None, Tensor | None, Tensor | None],
    qv: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    attention_chunk: int,
    softcap: float,
    return_attn_probs: bool,
    boundaries: tuple[Tensor, Tensor] | None = None,
    used: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Result:
    _check_chunk(attention_chunk)
    eight_bits = qkv[0].dtype == torch.float8_e4m3fn
    if eight_bits:
        q, k, v = _out_of_eight_bits(qkv, descales, boundaries)
    elif any(descale is not None for descale in descales):
        raise TypeError(f"q_descale, k_descale and v_descale belong to float8_e4m3fn inputs, and q is {qkv[0].dtype}")
    else:
        q, k, v = qkv
    if qv is not None:
        if qv.shape != (*q.shape[:-1], v.shape[-1]):
            raise ValueError(f"qv must have shape {(*q.shape[:-1], v.shape[-1])}, got {tuple(qv.shape)}")
        if not eight_bits and qv.dtype != q.dtype:
            raise TypeError(f"qv must have q's dtype {q.dtype}, got {qv.dtype}")
        q, k = torch.cat([q, qv.to(q.dtype) if eight_bits else qv], -1), torch.cat([k, v], -1)
    rows, index = len(q), None
    if boundaries is not None:
        starts_q, starts_k = boundaries
        if used[1] is not None:
            kept, starts_k = used_rows("seqused_k", starts_k, used[1], len(k))
            k, v = k[kept], v[kept]
        if used[0] is not None:
            index, starts_q = used_rows("seqused_q", starts_q, used[0], len(q))
            q = q[index]
        boundaries = starts_q, starts_k
    out, lse = attention_with_lse(
        q,
        k,
        v,
        causal=causal,
        window=window(window_size),
        scale=softmax_scale,
        softcap=softcap,
        cu_seqlens_q=None if boundaries is None else boundaries[0],
        cu_seqlens_k=None if boundaries is None else boundaries[1],
    )
    if index is not None:
        out = out.new_zeros(rows, *out.shape[1:]).index_copy(0, index, out)
        lse = lse.new_full((len(lse), rows), -math.inf).index_copy(1, index, lse)
    out = out.to(torch.bfloat16) if eight_bits else out
    return (out, lse) if return_attn_probs else out


def _check_chunk(attention_chunk: int) -> None:
    if attention_chunk != 0:
        raise NotImplementedError(f"attention_chunk must be 0, got {attention_chunk}: onchip has no chunked mask")


def _out_of_eight_bits(
    qkv: tuple[Tensor, Tensor, Tensor],
    descales: tuple[Tensor | None, Tensor | None, Tensor | None],
    boundaries: tuple[Tensor, Tensor] | None,
) -> list[Tensor]:
    """q, k and v in float32, times their factors per sequence and key head."""
    heads = qkv[1].shape[-2]
    batch = qkv[0].shape[0] if boundaries is None else boundaries[0].shape[0] - 1
    wide = []
    for name, x, descale in zip("qkv", qkv, descales, strict=True):
        if x.dtype != torch.float8_e4m3fn:
            raise TypeError(f"{name} must be float8_e4m3fn, as q is, got {x.dtype}")
        factor = torch.ones(batch, heads, device=x.device) if descale is None else descale
        if factor.shape != (batch, heads):
            raise ValueError(f"{name}_descale must have shape ({batch}, {heads}), got {tuple(factor.shape)}")
        if heads == 0 or x.shape[-2] % heads:
            raise ValueError(f"{name} must have a multiple of k's {heads} heads, got {x.shape[-2]}")
        factor = factor.float().repeat_interleave(x.shape[-2] // heads, dim=1)
        if boundaries is None:
            factor = factor[:, None]
        else:
            at = ("cu_seqlens_q", boundaries[0]) if name == "q" else ("cu_seqlens_k", boundaries[1])
            factor = factor[rows_of(*at, len(x)).sequence]
        wide.append(x.float() * factor[..., None])
    return wide
