"""The patterns of block masks, tile by tile: which tiles may be seen, which of them are alike, and by what rule.

Nothing here is of the size of the mask: of tiles that are alike one is evaluated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.integer[Any]]
Window = tuple[int | None, int | None]


class Layout(NamedTuple):
    """The tiles `(N, 4)` of (b, h, r, c) that may be seen, the kind of each, and the rule.

    Tiles of one kind have the same entries. `visible(b, h, i, j)` takes tensors that broadcast, and positions that may
    lie beyond the last query and the last key, where what it says does not matter.
    """

    tiles: Integers
    kinds: Integers
    visible: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def everywhere(
    batch: int, heads: int, tq: int, tk: int, block: int, visible: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
) -> Layout:
    """Any rule: every tile, each of its own kind."""
    tiles = np.indices((batch, heads, _count(tq, block), _count(tk, block))).reshape(4, -1).T
    return Layout(tiles, np.arange(len(tiles)), visible)


def local(tq: int, tk: int, window: Window, n_global: int, block: int) -> Layout:
    """A window along the diagonal, and the first keys and queries."""
    ahead, rows, columns = tk - tq, np.arange(_count(tq, block)), _count(tk, block)
    global_columns = min(_count(n_global, block), columns)
    first = rows * block + ahead
    sees_all = (first < n_global) & (first + block > 0) & (n_global > 0)  # some of its queries may
    tiles = _joined(
        columns,
        _in_window(tq, tk, window, block),
        (rows, np.zeros_like(rows), np.full_like(rows, global_columns)),
        (rows[sees_all], np.zeros_like(rows[sees_all]), np.full_like(rows[sees_all], columns)),
    )
    r, c = tiles[:, 2:].T
    kinds = _numbered(r - c, np.minimum(c, global_columns), np.where(sees_all[r], r, -1))

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        p = i + ahead
        return _near(p - j, window) | (j < n_global) | ((p >= 0) & (p < n_global))

    return Layout(tiles, kinds, visible)


def dilated(tq: int, tk: int, window: Window, stride: int, block: int) -> Layout:
    """Every `stride`-th key within a window along the diagonal."""
    ahead = tk - tq
    tiles = _joined(_count(tk, block), _in_window(tq, tk, window, block))

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        back = i + ahead - j
        return _near(back, window) & (back % stride == 0)

    return Layout(tiles, tiles[:, 2] - tiles[:, 3], visible)


def butterfly(length: int, max_stride: int | None, block: int) -> Layout:
    """The diagonal, and the tiles whose row and column differ in one bit."""
    count = _count(length, block)
    most = count - 1 if max_stride is None else max_stride
    strides = np.array([0, *(1 << n for n in range(count.bit_length()) if 1 << n <= most)])
    r = np.repeat(np.arange(count), len(strides))
    c = r ^ np.tile(strides, count)
    tiles = _of_all(r[c < count], c[c < count])
    return Layout(tiles, np.zeros(len(tiles), dtype=np.int64), lambda b, h, i, j: torch.ones_like(b, dtype=torch.bool))


def documents(lengths_q: list[int], lengths_k: list[int], block: int) -> Layout:
    """Documents that see themselves."""
    counts_q, counts_k = np.array(lengths_q, dtype=np.int64), np.array(lengths_k, dtype=np.int64)
    ends_q, ends_k = counts_q.cumsum(), counts_k.cumsum()
    (first_q, last_q), (first_k, last_k) = (_documents_of_tiles(ends, block) for ends in (ends_q, ends_k))
    rows = np.arange(len(first_q))
    starts_k = ends_k - counts_k
    tiles = _joined(len(first_k), (rows, starts_k[first_q] // block, -(-ends_k[last_q] // block)))
    r, c = tiles[:, 2:].T
    inside = (first_q[r] == last_q[r]) & (first_k[c] == last_k[c]) & (first_q[r] == first_k[c])

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return _document_of(i, ends_q) == _document_of(j, ends_k)

    return Layout(tiles, np.where(inside, -1, np.arange(len(tiles))), visible)


def _documents_of_tiles(ends: Integers, block: int) -> tuple[Integers, Integers]:
    """The documents of each tile's first and last position."""
    first = np.arange(_count(ends.max(initial=0), block)) * block
    of_first, of_last = _document_of(torch.from_numpy(np.stack((first, first + block - 1))), ends).numpy()
    return of_first, of_last


def _document_of(positions: Tensor, ends: Integers) -> Tensor:
    """The number of the document that holds each position; beyond the last position, the last one's."""
    inside = positions.clamp(max=int(ends.max(initial=0)) - 1).contiguous()
    return torch.searchsorted(torch.from_numpy(ends), inside, right=True)


def _near(back: Tensor, window: Window) -> Tensor:
    """Whether a key so far back is in the window."""
    left, right = window
    seen = torch.ones_like(back, dtype=torch.bool)
    if left is not None:
        seen &= back <= left
    if right is not None:
        seen &= back >= -right
    return seen


def _in_window(tq: int, tk: int, window: Window, block: int) -> tuple[Integers, Integers, Integers]:
    """Each row of tiles with the first of its tiles that the window reaches, and the one after the last."""
    (left, right), rows, columns = window, np.arange(_count(tq, block)), _count(tk, block)
    first = rows * block + (tk - tq)
    last = np.minimum(rows * block + block, tq) - 1 + (tk - tq)
    start = np.zeros_like(rows) if left is None else np.maximum(first - left, 0) // block
    stop = np.full_like(rows, columns) if right is None else (last + right) // block + 1
    return rows, start, np.minimum(stop, columns)


def _joined(columns: int, *ranges: tuple[Integers, Integers, Integers]) -> Integers:
    """The tiles of the ranges (row, first column, column after the last), each once."""
    parts = []
    for rows, start, stop in ranges:
        counts = np.maximum(stop - start, 0)
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        parts.append(np.repeat(rows * columns + start, counts) + within)
    places = np.unique(np.concatenate(parts))
    return _of_all(places // max(columns, 1), places % max(columns, 1))


def _of_all(r: Integers, c: Integers) -> Integers:
    """Tiles of a mask for all sequences and heads."""
    return np.stack((np.zeros_like(r), np.zeros_like(r), r, c), axis=1)


def _numbered(*labels: Integers) -> Integers:
    """One number for each combination of labels."""
    return np.unique(np.stack(labels), axis=1, return_inverse=True)[1].reshape(-1)


def _count(length: int, block: int) -> int:
    return -(-length // block)
