"""Attention over a key–value cache, contiguous or in pages: the public functions and their argument checks."""

from typing import Literal

from torch import Tensor

from onchip.ops import _select
from onchip.ops.attention import IMPLEMENTATIONS, Window
from onchip.ops.attention import checks as attention_checks
from onchip.ops.attention_with_cache import checks, op

Backend = Literal["cpu", "triton", "reference"]


def attention_with_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_seqlens: Tensor | None = None,
    rotary_interleaved: bool = True,
    causal: bool = True,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    batch_invariant: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    r"""Attention of new queries over a key–value cache, to which new keys may be appended; for inference.

    Row b of the batch holds n = cache_seqlens[b] keys. With k and v, Tn more are written behind them:

        cache[b, n + i] = rotate(k[b, i], position n + i),  i < Tn        (rotary_seqlens[b] + i where that is given)
        out[b] = attention(rotate(q[b]), the n + Tn keys of row b, their values)

    with masks aligned at the last query and the last key, as in `onchip.attention`. A prefill, a chunk of one and a
    decoding step are the same call, and rows may be of different lengths. The caller advances cache_seqlens.

    Args:
        q: `(B, Tq, H, D)`; float64, float32, bfloat16 or float16; any strides.
        k_cache: `(B, capacity, Hk, D)`, or with `block_table` `(pages, page size, Hk, D)`; H a multiple of Hk.
            Written to where k is given.
        v_cache: the same with head dim Dv, which may differ from D.
        cache_seqlens: `(B,)` int32 or int64: how many keys each row held before this call.
        k: `(B, Tn, Hk, D)`, appended to the cache.
        v: `(B, Tn, Hk, Dv)`, appended to the cache.
        cache_leftpad: `(B,)` int32 or int64, from 0 to cache_seqlens: that many of a row's first places hold no key.
            They count in cache_seqlens and in positions.
        block_table: `(B, pages of a row)` int32: key n of row b is key n % page size of page
            `block_table[b, n // page size]`. Entries beyond a row's keys may hold anything. Rows may share pages,
            but not those that are written. A cache with more rows than q is one of large pages:
            `block_table=index[:, None]` attends over its rows `index`.
        rotary: tables (cos, sin) of shape `(positions, n)`, 2n ≤ D, that turn the first 2n features of appended keys as
            they are written, and of queries. Query i stands beside the i-th of them; where neither `causal` nor
            `window` orders the queries, all of them beside the first. Needs k and v.
        rotary_seqlens: `(B,)` int32 or int64: the position of each row's first new key; by default cache_seqlens. They
            differ where the cache no longer holds a row's first keys. Needs `rotary`.
        rotary_interleaved: pairs of features are neighbours (2i, 2i + 1), as in `onchip.nn.rotary`; else (i, i + n).
        causal: as in `onchip.attention`, but by default True.
        window: as in `onchip.attention`.
        scale: as in `onchip.attention`.
        softcap: as in `onchip.attention`.
        alibi_slopes: as in `onchip.attention`.
        sinks: as in `onchip.attention`.
        batch_invariant: as in `onchip.attention`, whose bits the same row then has there.
        backend: as in `onchip.attention`.

    Returns:
        `(B, Tq, H, Dv)` in q's dtype, contiguous. A row without keys gives zeros.

    Raises:
        ValueError: shapes, lengths or values that do not fit, page tables that point outside the cache, keys for which
            it has no room; naming the argument, what was expected and what came. Nothing is written then.
        TypeError: dtypes or devices that do not fit.
        RuntimeError: a gradient is asked for.

    Lengths and page tables are checked in every call on a CPU. On a GPU they are read once as long as they do not
    change, which waits for the GPU once a step and not once a layer; not inside the capture of a CUDA graph, where what
    they say is trusted.

    Numerics: as `onchip.attention`; keys and queries are turned in float32 (float64 for float64) and rounded once.
    Under autocast q, k and v take the cache's dtype.
    Cost: 2·H·Tq·(D + Dv) operations for each key of each row; k_cache and v_cache are read once up to each row's
    length, which in decoding is all the time there is, and pages cost one look at the table each. On a GPU a cache
    whose last dimension is not contiguous is copied in every call.

    Source: Kwon et al., PagedAttention (arXiv 2309.06180); Dao, flash-attention's `flash_attn_with_kvcache`, whose
    rotary positions these are. Here pages may have any size, and what the table and the lengths say is checked.

    >>> import torch, onchip
    >>> k_cache, v_cache = torch.zeros(2, 10, 16, 4, 32)  # ten pages of 16 keys
    >>> pages = torch.tensor([[7, 2], [3, 0]], dtype=torch.int32)
    >>> lengths = torch.tensor([16, 5])
    >>> q, k, v = torch.randn(3, 2, 1, 4, 32)
    >>> out = onchip.attention_with_cache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths, block_table=pages)
    >>> torch.equal(k_cache[2, 0], k[0, 0]) and torch.equal(v_cache[3, 5], v[1, 0])
    True
    """
    return attention_with_cache_and_lse(
        q,
        k_cache,
        v_cache,
        cache_seqlens=cache_seqlens,
        k=k,
        v=v,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        rotary=rotary,
        rotary_seqlens=rotary_seqlens,
        rotary_interleaved=rotary_interleaved,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        batch_invariant=batch_invariant,
        backend=backend,
    )[0]


def attention_with_cache_and_lse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_seqlens: Tensor | None = None,
    rotary_interleaved: bool = True,
    causal: bool = True,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    batch_invariant: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention_with_cache` together with its log-sum-exp.

    Takes and raises what `attention_with_cache` does, at the same cost.

    Returns:
        `out` as `attention_with_cache` returns it, and `lse` `(B, H, Tq)`, as `onchip.attention_with_lse` has it.

    >>> import torch, onchip
    >>> q, (k_cache, v_cache) = torch.randn(1, 3, 2, 8), torch.randn(2, 1, 64, 2, 8)
    >>> out, lse = onchip.attention_with_cache_and_lse(q, k_cache, v_cache, cache_seqlens=torch.tensor([0]))
    >>> lse[0, 0]
    tensor([-inf, -inf, -inf])
    """
    q, k, v = checks.autocast(q, k, v, k_cache)
    checks.check_tensors(q, k_cache, v_cache, k, v, block_table)
    checks.check_places(q, k_cache, cache_seqlens, cache_leftpad, block_table)
    if rotary is not None:
        checks.check_rotary(q, k, rotary, rotary_interleaved)
    if rotary_seqlens is not None:
        if rotary is None:
            raise ValueError("rotary must be given where rotary_seqlens is")
        checks.check_counts("rotary_seqlens", rotary_seqlens, q)
    left, right = attention_checks.reach(causal, window)
    attention_checks.check_flag("batch_invariant", batch_invariant)
    attention_checks.check_factors(scale, softcap)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if alibi_slopes is not None or sinks is not None:
        attention_checks.check_score_terms(q, k_cache, None, alibi_slopes, sinks, None)
    tensors = (q, k_cache, v_cache)
    chosen = _select.choose("attention_with_cache", IMPLEMENTATIONS, backend, *tensors, batch_invariant=batch_invariant)
    places = (cache_seqlens, cache_leftpad, block_table, *(rotary or (None, None)), rotary_seqlens, rotary_interleaved)
    settings = (left, right, float(scale), float(softcap), alibi_slopes, sinks, batch_invariant)
    return op.attention_with_cache(*tensors, k, v, *places, *settings, chosen)


for _function in (attention_with_cache, attention_with_cache_and_lse):
    _select.register(_function, IMPLEMENTATIONS, tensors=3)
