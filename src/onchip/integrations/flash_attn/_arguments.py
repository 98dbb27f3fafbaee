"""What flash-attn's arguments mean to `onchip.attention_with_lse`."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onchip.ops.attention import checks, reference

Window = tuple[int, int]


def window(sides: Window) -> tuple[int | None, int | None]:
    """A window in which a negative side, -1 by custom, is unlimited."""
    if not isinstance(sides, tuple | list) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise ValueError(f"window_size must be a pair (left, right) of integers, -1 for no limit, got {sides!r}")
    left, right = (None if side < 0 else side for side in sides)
    return left, right


def signed_probabilities(
    q: Tensor,
    k: Tensor,
    alibi_slopes: Tensor | None,
    boundaries: tuple[Tensor, Tensor] | None,
    **settings: Any,
) -> Tensor:
    """flash-attn's S_dmask: the probabilities before dropout, those that are dropped times -1, without a gradient.

    `(B, H, Tq, Tk)` in q's dtype, Tq and Tk the longest lengths, both padded with zeros to multiples of 128. It is the
    one thing here that holds a value for every pair, which is what its caller asked for.
    Without dropout it is empty.
    """
    if settings["dropout_p"] == 0:
        return q.new_empty(0)
    left, right = checks.reach(settings["causal"], settings["window"])
    rest = {name: settings[name] for name in ("scale", "softcap")}
    dropout = reference.Dropout(settings["dropout_p"], settings["seed"])
    with torch.no_grad():
        parts = []
        for b, (rows, keys) in enumerate(_sequences(q, k, boundaries)):
            slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes[b : b + 1]
            p, _ = reference.attention_matrix(rows, keys, left=left, right=right, alibi_slopes=slopes, **rest)
            p = torch.where(dropout._replace(first_sequence=b).kept(p.shape, p.device), p, -p)
            parts.append(p[0].to(q.dtype))
        tq, tk = (128 * -(-max((p.shape[axis] for p in parts), default=0) // 128) for axis in (1, 2))
        padded = [F.pad(p, (0, tk - p.shape[2], 0, tq - p.shape[1])) for p in parts]
        return torch.stack(padded) if padded else q.new_empty(0, q.shape[-2], tq, tk)


def _sequences(q: Tensor, k: Tensor, boundaries: tuple[Tensor, Tensor] | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Each sequence's queries and keys, as batches of one."""
    if boundaries is None:
        return zip(torch.split(q, 1), torch.split(k, 1), strict=True)
    parts = [torch.split(x[None], cu.diff().tolist(), dim=1) for x, cu in zip((q, k), boundaries, strict=True)]
    return zip(*parts, strict=True)


def unpack(name: str, packed: Tensor, parts: int, packed_rows: bool) -> tuple[Tensor, ...]:
    """The q, k and v, or k and v, that lie side by side before the heads; their gradients meet there again."""
    rank = 4 if packed_rows else 5
    if packed.ndim != rank or packed.shape[-3] != parts:
        rows = "total" if packed_rows else "batch, time"
        raise ValueError(f"{name} must have shape ({rows}, {parts}, heads, dim), got {tuple(packed.shape)}")
    return packed.unbind(-3)
