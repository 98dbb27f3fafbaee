"""A key–value cache as flash-attn describes it, in the terms of `onchip.attention_with_cache`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from onchip.ops._read import read
from onchip.ops.attention_with_cache import attention_with_cache_and_lse


class Cache(NamedTuple):
    """Keys and values, how many each of the batch's rows holds, and where they are."""

    k: Tensor
    v: Tensor
    lengths: Tensor
    leftpad: Tensor | None
    table: Tensor | None

    def attend(self, q: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        """`onchip.attention_with_cache_and_lse` of these."""
        return attention_with_cache_and_lse(
            q,
            self.k,
            self.v,
            cache_seqlens=self.lengths,
            cache_leftpad=self.leftpad,
            block_table=self.table,
            **more,
        )


def cache_of(
    batch: int,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    table: tuple[str, Tensor | None],
    *,
    appends: bool,
) -> Cache:
    """The cache of a call with `batch` rows; `table` comes with the name of its argument."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(cache, Tensor) or cache.ndim != 4:
            shape = tuple(cache.shape) if isinstance(cache, Tensor) else type(cache).__name__
            raise ValueError(f"{name} must be a tensor of 4 dimensions, (rows or pages, time, heads, dim), got {shape}")
    name, pages = table
    if cache_batch_idx is not None:
        if pages is not None:
            raise ValueError(f"cache_batch_idx must be None where {name} is given: the table says which pages are read")
        pages = _whole_rows(cache_batch_idx, batch, k_cache)
    elif pages is None:  # rows of the cache after the batch's are nobody's
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    if cache_seqlens is None:
        if appends:
            raise ValueError("cache_seqlens must be given where k and v are: it says where they go")
        cache_seqlens = k_cache.shape[1] * (1 if pages is None or pages.ndim != 2 else pages.shape[1])
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=k_cache.device)
    return Cache(k_cache, v_cache, cache_seqlens, cache_leftpad, pages)


def _whole_rows(cache_batch_idx: Tensor, batch: int, k_cache: Tensor) -> Tensor:
    """A table in which each row of the cache is one page."""
    if not isinstance(cache_batch_idx, Tensor) or cache_batch_idx.dtype not in (torch.int32, torch.int64):
        got = getattr(cache_batch_idx, "dtype", type(cache_batch_idx).__name__)
        raise TypeError(f"cache_batch_idx must be a tensor of int32 or int64, got {got}")
    if cache_batch_idx.shape != (batch,):
        raise ValueError(f"cache_batch_idx must have shape ({batch},), got {tuple(cache_batch_idx.shape)}")
    if not (cache_batch_idx.is_cuda and torch.cuda.is_current_stream_capturing()):
        rows = read(cache_batch_idx)
        if batch and not 0 <= rows.min() <= rows.max() < len(k_cache):
            raise ValueError(f"cache_batch_idx must name rows from 0 to {len(k_cache) - 1}, got {rows.tolist()}")
    return cache_batch_idx[:, None].int()


def rotary_tables(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The pair that onchip takes."""
    if cos is None and sin is None:
        return None
    if cos is None or sin is None:
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise ValueError(f"rotary_cos and rotary_sin must be given together, got no {missing}")
    return cos, sin
