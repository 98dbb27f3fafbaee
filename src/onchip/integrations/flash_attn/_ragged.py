"""Packed queries and keys over a cache, whose sequences have different lengths, brought to a rectangular call.

`onchip.attention_with_cache` takes as many queries for each row, and appends as many keys. Masks are aligned at the
last query, so sequences of queries are put into a rectangle at its right edge; what stands before them is thrown away.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from onchip.integrations.flash_attn._cache import Cache
from onchip.ops._read import read
from onchip.ops.attention import checks as attention_checks
from onchip.ops.attention_with_cache import checks
from onchip.ops.attention_with_cache.append import rotate


class Rows(NamedTuple):
    """Packed rows: of which sequence each is, which of its rows it is, and the sequences' lengths."""

    sequence: Tensor
    place: Tensor
    lengths: Tensor
    longest: int

    def to_the_right(self, x: Tensor) -> Tensor:
        """`(total, …)` as `(B, longest, …)`, each sequence ending at the right edge, zeros before it."""
        padded = x.new_zeros(len(self.lengths), self.longest, *x.shape[1:])
        padded[self.sequence, self._column] = x
        return padded

    def back(self, x: Tensor) -> Tensor:
        """`to_the_right` undone."""
        return x[self.sequence, self._column]

    @property
    def _column(self) -> Tensor:
        return self.place + self.longest - self.lengths[self.sequence]


def check_boundaries(name: str, boundaries: Tensor) -> None:
    """A line of integers; what they are is not looked at."""
    _check_integers(name, boundaries)
    if boundaries.ndim != 1 or len(boundaries) == 0:
        raise ValueError(f"{name} must have shape (sequences + 1,), got {tuple(boundaries.shape)}")


def _check_integers(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {getattr(x, 'dtype', type(x).__name__)}")


def rows_of(name: str, boundaries: Tensor, rows: int) -> Rows:
    """The rows between these boundaries, which are checked."""
    check_boundaries(name, boundaries)
    longest = attention_checks.longest_sequence(name, read(boundaries).tolist(), rows)
    lengths = boundaries.diff().long()
    sequence = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=rows)
    place = torch.arange(rows, device=lengths.device) - boundaries[:-1].long()[sequence]
    return Rows(sequence, place, lengths, longest)


def used_rows(name: str, boundaries: Tensor, used: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Which rows are the first `used[b]` of their sequences, and those rows' own boundaries."""
    all_rows = rows_of(f"cu_seqlens_{name[-1]}", boundaries, rows)
    _check_integers(name, used)
    if used.shape != all_rows.lengths.shape:
        raise ValueError(f"{name} must have shape ({len(all_rows.lengths)},), got {tuple(used.shape)}")
    if bool(((used < 0) | (used > all_rows.lengths)).any()):
        raise ValueError(
            f"{name} must be from 0 to the sequences' lengths {all_rows.lengths.tolist()}, got {used.tolist()}"
        )
    index = (all_rows.place < used[all_rows.sequence]).nonzero().flatten()
    return index, F.pad(used.cumsum(0, dtype=boundaries.dtype), (1, 0))


class Rotary(NamedTuple):
    """Tables of cosines and sines, and at which positions the new tokens of each row begin."""

    tables: tuple[Tensor, Tensor]
    interleaved: bool
    begins: Tensor

    def turn(self, x: Tensor, rows: Rows, *, in_order: bool) -> Tensor:
        """Packed rows turned by their positions, or where they are not in order by those that their rows begin at."""
        positions = self.begins.long()[rows.sequence] + (rows.place if in_order else 0)
        return rotate(x[None], positions[None], *self.tables, interleaved=self.interleaved)[0]


def attend_in_layout(
    q: Tensor,
    cu_seqlens_q: Tensor | None,
    cache: Cache,
    k: Tensor | None,
    v: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    qv: Tensor | None,
    rotary: Rotary | None,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """`attend` for queries, and keys, that are packed where their boundaries are given, else a rectangle."""
    if (k is None) != (v is None):
        raise ValueError(f"k and v must be given together, got only {'v' if k is None else 'k'}")
    queries, flat_q = _packed("q", "cu_seqlens_q", q, cu_seqlens_q)
    new = None
    if k is not None and v is not None:
        rows, flat_k = _packed("k", "cu_seqlens_k_new", k, cu_seqlens_k_new)
        new = flat_k, _packed("v", "cu_seqlens_k_new", v, cu_seqlens_k_new)[1], rows
    elif cu_seqlens_k_new is not None:
        raise ValueError("k and v must be given where cu_seqlens_k_new is")
    flat_qv = qv if qv is None or cu_seqlens_q is not None else qv.flatten(0, 1)
    out, lse = attend(flat_q, queries, cache, new, flat_qv, rotary, **settings)
    if cu_seqlens_q is not None:
        return out, lse
    return out.view(*q.shape[:2], *out.shape[1:]), lse.view(-1, *q.shape[:2]).transpose(0, 1).contiguous()


def _packed(name: str, boundaries_name: str, x: Tensor, boundaries: Tensor | None) -> tuple[Rows, Tensor]:
    """Rows that are packed already, or a rectangle of them, as packed rows."""
    rank = 4 if boundaries is None else 3
    if not isinstance(x, Tensor) or x.ndim != rank:
        layout = "(batch, time, heads, dim)" if boundaries is None else "(total, heads, dim)"
        raise ValueError(f"{name} must be a tensor {layout}, got {tuple(getattr(x, 'shape', ()))}")
    if boundaries is None:
        batch, time = x.shape[:2]
        boundaries, x = time * torch.arange(batch + 1, device=x.device), x.flatten(0, 1)
    return rows_of(boundaries_name, boundaries, len(x)), x


def attend(
    q: Tensor,
    queries: Rows,
    cache: Cache,
    new: tuple[Tensor, Tensor, Rows] | None,
    qv: Tensor | None,
    rotary: Rotary | None,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Packed queries `(total, H, D)` over a cache, to which packed keys and values may be added; nothing is ignored.

    The output is `(total, H, Dv)` and the log-sum-exp `(H, total)`.
    """
    left, right = attention_checks.reach(settings["causal"], settings["window"])
    in_order = left >= 0 or right >= 0
    _check(q, queries, cache, new, qv, rotary, in_order=in_order)
    if rotary is not None:
        q = rotary.turn(q, queries, in_order=in_order)
    if new is not None:
        k, v, rows = new
        cache = _append(cache, k if rotary is None else rotary.turn(k, rows, in_order=True), v, rows)
    if qv is not None:
        q, cache = torch.cat([q, qv], -1), cache._replace(k=torch.cat([cache.k, cache.v], -1))
    out, lse = cache.attend(queries.to_the_right(q), **settings)
    return queries.back(out), queries.back(lse.transpose(1, 2)).t().contiguous()


def _append(cache: Cache, k: Tensor, v: Tensor, rows: Rows) -> Cache:
    """The cache with the packed keys and values written behind what its rows hold."""
    positions = cache.lengths.long()[rows.sequence] + rows.place
    places = rows.sequence, positions
    if cache.table is not None:
        size = cache.k.shape[1]
        places = cache.table[rows.sequence, positions // size].long(), positions % size
    cache.k[places], cache.v[places] = k, v
    return cache._replace(lengths=cache.lengths + rows.lengths.to(cache.lengths.dtype))


_ANY = 1 << 62  # a capacity that no row exceeds


def _check(
    q: Tensor,
    queries: Rows,
    cache: Cache,
    new: tuple[Tensor, Tensor, Rows] | None,
    qv: Tensor | None,
    rotary: Rotary | None,
    *,
    in_order: bool,
) -> None:
    """Everything fits, before anything is written."""
    tensors = {"q": q, "qv": qv, "k_cache": cache.k, "v_cache": cache.v}
    if new is not None:
        tensors |= {"k": new[0], "v": new[1]}
    for name, x in tensors.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"attention over a cache is for inference, and {name} requires a gradient")
    k, v = (None, None) if new is None else (new[0][None], new[1][None])
    checks.check_tensors(q[None], cache.k, cache.v, k, v, cache.table)
    batch = len(queries.lengths)
    rows = q.new_empty(batch, 0, 1, 1)
    checks.check_places(rows, cache.k, cache.lengths, cache.leftpad, cache.table)
    added = torch.zeros_like(queries.lengths) if new is None else new[2].lengths
    if len(added) != batch:
        raise ValueError(f"cu_seqlens_k_new must have shape ({batch + 1},), got ({len(added) + 1},)")
    starts = None if cache.leftpad is None else cache.leftpad.tolist()
    checks.check_values(cache.lengths.tolist(), starts, None, (batch, _ANY), 0)
    held, table = (cache.lengths + added).tolist(), None if cache.table is None else read(cache.table)
    pages, size = cache.k.shape[:2]
    if max(held, default=0) > (capacity := size if table is None else size * table.shape[1]):
        raise ValueError(f"cache_seqlens plus the appended keys must be at most {capacity}, got {held}")
    checks.check_values(held, starts, table, (pages, size), 0)
    if qv is not None and (qv.shape != (*q.shape[:-1], cache.v.shape[-1]) or qv.dtype != q.dtype):
        want = (*q.shape[:-1], cache.v.shape[-1])
        raise ValueError(f"qv must have shape {want} and dtype {q.dtype}, got {tuple(qv.shape)} and {qv.dtype}")
    if rotary is not None:
        checks.check_rotary(q[None], k, rotary.tables, rotary.interleaved)
        checks.check_counts("rotary_seqlens", rotary.begins, rows)
        turned = queries.lengths if in_order else queries.lengths.clamp(max=1)
        for first, count in zip(rotary.begins.tolist(), torch.maximum(added, turned).tolist(), strict=True):
            if not 0 <= first <= rotary.tables[0].shape[0] - count:
                raise ValueError(
                    f"rotary_cos must cover positions {first} to {first + count - 1}, got {len(rotary.tables[0])}"
                )
