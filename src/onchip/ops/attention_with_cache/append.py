"""New keys and values put into the cache, keys and queries turned: for backends without a kernel for it."""

import torch
from torch import Tensor


def append(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
    rotary_seqlens: Tensor | None,
    *,
    interleaved: bool,
    in_order: bool,
) -> Tensor:
    """Write k and v to the cache, k turned by its positions; the queries, turned by theirs.

    `in_order`: query i stands beside key i of the new ones, else all beside the first.
    """
    before, new = cache_seqlens.long()[:, None], torch.arange(k.shape[1], device=k.device)
    if rotary is not None:
        first = before if rotary_seqlens is None else rotary_seqlens.long()[:, None]
        k = rotate(k, first + new, *rotary, interleaved=interleaved)
        steps = torch.arange(q.shape[1], device=q.device)
        q = rotate(q, first + (steps if in_order else 0 * steps), *rotary, interleaved=interleaved)
    places = slots(before + new, block_table, k_cache.shape[1])
    k_cache[places] = k
    v_cache[places] = v
    return q


def slots(positions: Tensor, block_table: Tensor | None, page_size: int) -> tuple[Tensor, Tensor]:
    """Where in the cache the keys at these positions `(B, T)` are: an index of its first two dimensions."""
    row = torch.arange(positions.shape[0], device=positions.device)[:, None]
    if block_table is None:
        return row, positions
    return block_table[row, positions // page_size].long(), positions % page_size


def rotate(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """`x (B, T, H, D)` with its first 2n features turned in pairs by the angles of `positions (B, T)`.

    `cos` and `sin` are `(positions, n)`. A pair is two neighbours (interleaved), or features i and i + n. In float32,
    float64 for float64.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    n = cos.shape[1]
    cos, sin = (table[positions][:, :, None].to(wide.dtype) for table in (cos, sin))  # (B, T, 1, n)
    turning, rest = wide[..., : 2 * n], wide[..., 2 * n :]
    a, b = (turning[..., ::2], turning[..., 1::2]) if interleaved else (turning[..., :n], turning[..., n:])
    pair = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned, rest], dim=-1).to(x.dtype)
