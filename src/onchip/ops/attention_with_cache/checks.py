"""What a call over a cache must satisfy, and the sentences that say so when it does not."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onchip.ops.attention.checks import DTYPES

Integers = NDArray[np.integer]


def autocast(
    q: Tensor, k: Tensor | None, v: Tensor | None, cache: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """q, k and v in the cache's dtype where autocast is on: the cache cannot follow them."""
    if not torch._C._is_any_autocast_enabled() or not all(isinstance(x, Tensor) for x in (q, cache)):
        return q, k, v
    kind = cache.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        k, v = (x.to(cache.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in (k, v))
        q = q.to(cache.dtype) if q.is_floating_point() else q
    return q, k, v


def check_tensors(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, block_table: Tensor | None
) -> None:
    """q, the cache and what is appended to it fit each other in type, rank and shape."""
    if (k is None) != (v is None):
        raise ValueError(f"k and v must be given together, got only {'v' if k is None else 'k'}")
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a tensor, got {type(q).__name__}")
    dtype, device = q.dtype, q.device
    if dtype not in DTYPES:
        raise TypeError(f"q must be float64, float32, bfloat16 or float16, got {dtype}")
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        if x is None and len(name) == 1:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != 4:
            pages = block_table is not None and len(name) > 1
            layout = "(pages, page size, heads, dim)" if pages else "(batch, time, heads, dim)"
            raise ValueError(f"{name} must have 4 dimensions {layout}, got shape {tuple(x.shape)}")
        if x.dtype != dtype or x.device != device:
            raise TypeError(f"{name} must have q's dtype and device ({dtype}, {device}), got ({x.dtype}, {x.device})")
    _check_shapes(q, k_cache, v_cache, k, v)


def _check_shapes(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None) -> None:
    # Unpacked once: a shape costs as much as ten comparisons, and these are the price of every small call.
    (batch, _, heads, head_dim), (*places, key_dim), (*_, value_dim) = q.shape, k_cache.shape, v_cache.shape
    if key_dim != head_dim:
        raise ValueError(f"k_cache must have q's head dim {head_dim}, got shape {tuple(k_cache.shape)}")
    if v_cache.shape != (*places, value_dim):
        raise ValueError(
            f"v_cache must have k_cache's shape {tuple(places)} before its head dim, got shape {tuple(v_cache.shape)}"
        )
    if head_dim == 0 or value_dim == 0:
        raise ValueError(f"head dims must be at least 1, got {head_dim} for q and k, {value_dim} for v")
    kv_heads = places[2]
    if heads == 0 or kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"q's heads must be a multiple of k_cache's, both at least 1, got {heads} and {kv_heads}")
    if k is not None and v is not None:
        added = k.size(1)
        for name, x, dim in (("k", k, head_dim), ("v", v, value_dim)):
            want = (batch, added, kv_heads, dim)
            if x.shape != want:
                raise ValueError(
                    f"{name} must have q's batch size, as many keys as k, and {name}_cache's heads and head dim "
                    f"{want}, got shape {tuple(x.shape)}"
                )


def check_places(
    q: Tensor, k_cache: Tensor, cache_seqlens: Tensor, cache_leftpad: Tensor | None, block_table: Tensor | None
) -> None:
    """The tensors that say where each row's keys are have the right types and shapes."""
    check_counts("cache_seqlens", cache_seqlens, q)
    if cache_leftpad is not None:
        check_counts("cache_leftpad", cache_leftpad, q)
    if block_table is None:
        if k_cache.shape[0] != q.shape[0]:
            raise ValueError(
                f"k_cache must have q's batch size {q.shape[0]} where block_table is not given, "
                f"got shape {tuple(k_cache.shape)}"
            )
        return
    _check_integers("block_table", block_table, q, (torch.int32,))
    if block_table.ndim != 2 or block_table.shape[0] != q.shape[0]:
        raise ValueError(
            f"block_table must have shape ({q.shape[0]}, pages of a row), a line for each row of q, "
            f"got {tuple(block_table.shape)}"
        )
    if k_cache.shape[1] == 0:
        raise ValueError(f"pages of k_cache must hold at least one key, got shape {tuple(k_cache.shape)}")


def check_counts(name: str, x: Tensor, q: Tensor) -> None:
    """`x` has an integer for each row."""
    _check_integers(name, x, q, (torch.int32, torch.int64))
    if x.shape != q.shape[:1]:
        raise ValueError(f"{name} must have shape ({q.shape[0]},), one entry a row of q, got {tuple(x.shape)}")


def _check_integers(name: str, x: object, q: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, Tensor) or x.dtype not in dtypes:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be a tensor of {kinds}, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.device != q.device:
        raise TypeError(f"{name} must be on q's device {q.device}, got {x.device}")


def check_rotary(q: Tensor, k: Tensor | None, rotary: tuple[Tensor, Tensor], interleaved: bool) -> None:
    """The tables of cosines and sines fit each other and the heads."""
    if not isinstance(rotary, tuple | list) or len(rotary) != 2 or not all(isinstance(x, Tensor) for x in rotary):
        raise TypeError(f"rotary must be a pair of tensors (cos, sin), got {type(rotary).__name__}")
    if k is None:
        raise ValueError("k and v must be given where rotary is: the keys in the cache are rotated already")
    if not isinstance(interleaved, bool):
        raise TypeError(f"rotary_interleaved must be True or False, got {interleaved!r}")
    cos, sin = rotary
    for name, x in (("cos", cos), ("sin", sin)):
        if x.dtype not in DTYPES:
            raise TypeError(f"rotary's {name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
        if x.device != q.device:
            raise TypeError(f"rotary's {name} must be on q's device {q.device}, got {x.device}")
        if x.ndim != 2 or x.shape != cos.shape or x.dtype != cos.dtype or not 0 < 2 * x.shape[1] <= q.shape[-1]:
            raise ValueError(
                f"rotary's {name} must have shape (positions, n) and cos's dtype {cos.dtype}, 0 < 2n ≤ the head dim "
                f"{q.shape[-1]}, got {tuple(x.shape)} and {x.dtype}"
            )


def check_values(
    lengths: list[int], starts: list[int] | None, table: Integers | None, cache: tuple[int, int], added: int
) -> None:
    """Rows fit in the cache, with the `added` keys, and their pages are pages of it.

    `cache` is (pages, page size), or (batch, capacity) where there is no table.
    """
    size = cache[1]
    capacity = size if table is None else table.shape[1] * size
    for b, n in enumerate(lengths):
        if n < 0:
            raise ValueError(f"cache_seqlens must not be negative, got {n} for row {b}")
        if n + added > capacity:
            room = f"the cache's capacity {capacity}"
            if table is not None:
                room = f"what block_table's {table.shape[1]} pages of {size} hold"
            raise ValueError(
                f"cache_seqlens plus the {added} appended keys must be at most {room}, got {n} for row {b}"
            )
    for b, start in enumerate(starts or ()):
        if not 0 <= start <= lengths[b]:
            raise ValueError(
                f"cache_leftpad must be between 0 and cache_seqlens, got {start} for row {b}, which holds {lengths[b]}"
            )
    if table is not None and table.view(np.uint32).max(initial=0) >= cache[0]:  # as unsigned, -1 is the largest
        _check_pages([n + added for n in lengths], starts, table, cache)


def _check_pages(lengths: list[int], starts: list[int] | None, table: Integers, cache: tuple[int, int]) -> None:
    """The entries that a row uses name pages; the others may hold anything."""
    pages, size = cache
    for b, n in enumerate(lengths):
        first = 0 if starts is None else starts[b] // size
        used = table[b, first : -(-n // size)]
        outside = np.flatnonzero((used < 0) | (used >= pages))
        if len(outside):
            i = int(outside[0])
            raise ValueError(
                f"block_table must name pages from 0 to {pages - 1}, got {used[i]} for row {b} at index {first + i}"
            )


def check_positions(first: list[int], positions: int, count: int) -> None:
    """The rotary tables have the `count` positions from each row's first on."""
    for b, n in enumerate(first):
        if n < 0:
            raise ValueError(f"rotary_seqlens must not be negative, got {n} for row {b}")
        if n + count > positions:
            raise ValueError(
                f"rotary's tables must cover {n + count} positions for row {b}, whose new keys begin at {n}, "
                f"got {positions}"
            )
