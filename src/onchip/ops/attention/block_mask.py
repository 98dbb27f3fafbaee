"""Which tiles of an attention matrix are computed: lists of them, and the bits of those that are seen in part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onchip.ops._count import check_count
from onchip.ops.attention import block_patterns
from onchip.ops.attention.block_patterns import Layout, Window

Integers = NDArray[np.integer[Any]]

FULL, EMPTY = -1, -2  # instead of the number of a tile's bits
SMALLEST_BLOCK = 32  # bits of a word, and the fewest keys of a tile in the kernels
_ENTRIES = 1 << 21  # of a mask that are evaluated at once


class Lists(NamedTuple):
    """For each tile along one axis, the visible tiles along the other, ascending.

    The entries of tile n, sequence b and head h are those from `starts[b, h, n]` to `starts[b, h, n + 1]`, where
    `starts` is `(B or 1, H or 1, tiles + 1)`; `entries (N, 2)` are pairs of a tile and the number of its bits, or FULL.
    """

    starts: Tensor
    entries: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """Which keys each query sees, in tiles: what attention skips, it does not pay for.

        visible[b, h, i, j] = tile (i // block, j // block) of (b, h) is full, or has bit (i % block, j % block)

    Made by `from_dense`, `from_predicate` and the patterns `local`, `dilated`, `butterfly` and `documents`; two are
    combined by `&`. One mask serves many calls. Memory: 16 bytes a visible tile (it is listed by queries and by keys),
    and block² / 8 bytes for each distinct tile that is seen in part, of which a pattern has few. Never a Tq×Tk array.

    Source: Dao et al., FlashAttention (arXiv 2205.14135, §3.3), whose masks are of whole tiles; here a tile may be
    seen in part.

    Attributes:
        shape: (Tq, Tk).
        by_query: for each tile of queries the visible tiles of keys.
        by_key: for each tile of keys the tiles of queries that see it.
        bits: `(distinct, block, block // 32)` int32: bit j % 32 of word j // 32 is key j.

    >>> import torch, onchip
    >>> mask = onchip.BlockMask.local(1024, 1024, window=(128, 0), n_global=4)
    >>> mask
    BlockMask(1024×1024, block 128, density 0.44)
    >>> q = torch.randn(1, 1024, 2, 16)
    >>> onchip.attention(q, q, q, block_mask=mask).shape
    torch.Size([1, 1024, 2, 16])
    """

    shape: tuple[int, int]
    by_query: Lists
    by_key: Lists
    bits: Tensor

    @classmethod
    def from_dense(cls, mask: Tensor, *, block: int = 128) -> "BlockMask":
        """From a boolean `(Tq, Tk)` or `(B or 1, H or 1, Tq, Tk)`, True where the key is seen; on its device.

        >>> import torch, onchip
        >>> onchip.BlockMask.from_dense(torch.eye(100, 300, dtype=torch.bool), block=32).density
        0.1
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a boolean tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.ndim not in (2, 4):
            raise ValueError(f"mask must have shape (Tq, Tk) or (B or 1, H or 1, Tq, Tk), got {tuple(mask.shape)}")
        mask = mask[(None,) * (4 - mask.ndim)]
        dense, (batch, heads, tq, tk) = mask.cpu(), mask.shape
        made = cls.from_predicate(lambda b, h, i, j: dense[b, h, i, j], tq, tk, batch=batch, heads=heads, block=block)
        return made.to(mask.device)

    @classmethod
    def from_predicate(
        cls,
        visible: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        tq: int,
        tk: int,
        *,
        batch: int = 1,
        heads: int = 1,
        block: int = 128,
    ) -> "BlockMask":
        """From a function of positions: `visible(b, h, i, j)` says whether query i sees key j.

        It is called with int64 tensors on the CPU that broadcast against each other, some tiles at a time, and returns
        booleans that broadcast to their common shape. With `batch` or `heads` of 1 one mask serves all.

        >>> import onchip
        >>> onchip.BlockMask.from_predicate(lambda b, h, i, j: (i - j) % 3 == h, 200, 200, heads=3, block=64)
        BlockMask(200×200 of 3 heads, block 64, density 1.00)
        """
        _check_sizes(tq, tk, block)
        check_count("batch", batch, least=1)
        check_count("heads", heads, least=1)

        def inside(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            # Beyond the end the last query and key are repeated: a tile there is full or empty as it is inside.
            seen = visible(b, h, i.clamp(max=tq - 1), j.clamp(max=tk - 1))
            if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
                got = getattr(seen, "dtype", type(seen).__name__)
                raise TypeError(f"visible must return a boolean tensor, got {got}")
            shape = (*b.shape[:1], *i.shape[1:2], *j.shape[2:])
            if seen.ndim > 3 or any(n not in (1, m) for n, m in zip(seen.shape[::-1], shape[::-1], strict=False)):
                raise ValueError(f"visible must return a shape that broadcasts to {shape}, got {tuple(seen.shape)}")
            return seen

        return cls._of(block_patterns.everywhere(batch, heads, tq, tk, block, inside), (tq, tk), (batch, heads), block)

    @classmethod
    def local(cls, tq: int, tk: int, *, window: Window, n_global: int = 0, block: int = 128) -> "BlockMask":
        """A window around each query's own position, and tokens that see, and are seen by, all.

        With p = i + Tk - Tq, query i sees the keys p - left ≤ j ≤ p + right (`window`, None for no limit); and key
        j < n_global is seen by all, and the queries 0 ≤ p < n_global see all. Source: Beltagy et al., Longformer (arXiv
        2004.05150); Zaheer et al., BigBird (arXiv 2007.14062), without its random tiles.

        >>> import onchip
        >>> onchip.BlockMask.local(4096, 4096, window=(256, 256), n_global=1).density < 0.25
        True
        """
        _check_sizes(tq, tk, block)
        check_count("n_global", n_global)
        _check_window(window)
        return cls._of(block_patterns.local(tq, tk, window, n_global, block), (tq, tk), (1, 1), block)

    @classmethod
    def dilated(cls, tq: int, tk: int, *, stride: int, window: Window = (None, None), block: int = 128) -> "BlockMask":
        """Every `stride`-th key, counted from each query's own position, within a window.

        With p = i + Tk - Tq, query i sees the keys p - left ≤ j ≤ p + right for which p - j is a multiple of `stride`.
        A tile is skipped where none of its keys is such: only a stride greater than the block's saves time by itself.
        Source: Child et al., Sparse Transformers (arXiv 1904.10509); Longformer's dilated windows.

        >>> import onchip
        >>> onchip.BlockMask.dilated(2048, 2048, stride=512, block=64).density
        0.125
        """
        _check_sizes(tq, tk, block)
        check_count("stride", stride, least=1)
        _check_window(window)
        return cls._of(block_patterns.dilated(tq, tk, window, stride, block), (tq, tk), (1, 1), block)

    @classmethod
    def butterfly(cls, length: int, *, max_stride: int | None = None, block: int = 128) -> "BlockMask":
        """The tiles (r, c) with r = c or r xor c a power of two: the supports of the butterfly factors, all at once.

        A row of n tiles keeps 1 + log2 n of them, or with `max_stride` those with r xor c ≤ max_stride. Source: Dao et
        al., Pixelated Butterfly (arXiv 2112.00029), its flat block butterfly, on which FlashAttention's block-sparse
        form was run; its low-rank part is what `local`'s global tokens are.

        >>> import onchip
        >>> onchip.BlockMask.butterfly(8192).density
        0.109375
        """
        _check_sizes(length, length, block)
        if max_stride is not None:
            check_count("max_stride", max_stride, least=1)
        layout = block_patterns.butterfly(length, max_stride, block)
        return cls._of(layout, (length, length), (1, 1), block)

    @classmethod
    def documents(
        cls, lengths: Sequence[int] | Tensor, lengths_k: Sequence[int] | Tensor | None = None, *, block: int = 128
    ) -> "BlockMask":
        """Documents one after another, each of which sees itself only.

        Args:
            lengths: of the documents' queries; of boundaries `cu_seqlens` they are `cu_seqlens.diff()`.
            lengths_k: of their keys; by default the same.
            block: queries and keys of a tile.

        >>> import onchip
        >>> onchip.BlockMask.documents([100, 28, 384], block=64).density
        0.625
        """
        _check_block(block)
        of_q = _counts("lengths", lengths)
        of_k = of_q if lengths_k is None else _counts("lengths_k", lengths_k)
        if len(of_q) != len(of_k):
            raise ValueError(f"lengths_k must have lengths' {len(of_q)} documents, got {len(of_k)}")
        return cls._of(block_patterns.documents(of_q, of_k, block), (sum(of_q), sum(of_k)), (1, 1), block)

    @classmethod
    def _of(cls, layout: Layout, shape: tuple[int, int], own: tuple[int, int], block: int) -> "BlockMask":
        """The layout evaluated, once for each kind of tile."""
        distinct = _Distinct(block)
        _, first, kind = np.unique(layout.kinds, return_index=True, return_inverse=True)
        numbers = np.empty(len(first), dtype=np.int64)
        within = torch.arange(block)
        step = max(_ENTRIES // block**2, 1)
        for at in range(0, len(first), step):
            b, h, r, c = (torch.from_numpy(x)[:, None, None] for x in layout.tiles[first[at : at + step]].T.copy())
            seen = layout.visible(b, h, r * block + within[:, None], c * block + within)
            seen = seen.expand(len(b), block, block)
            words = np.packbits(seen.numpy(), axis=-1, bitorder="little").view(np.int32)
            numbers[at : at + step] = distinct.numbers(words)
        return cls._assembled(layout.tiles, numbers[kind], distinct.bits, shape, own)

    @classmethod
    def _assembled(
        cls, tiles: Integers, numbers: Integers, bits: Integers, shape: tuple[int, int], own: tuple[int, int]
    ) -> "BlockMask":
        """Of the tiles (b, h, r, c) and the numbers of their bits, in any order."""
        (b, h, r, c), numbers = tiles[numbers != EMPTY].T, numbers[numbers != EMPTY]
        counts = [_count(n, bits.shape[1]) for n in shape]
        pair = b * own[1] + h
        by_query = _lists(pair * counts[0] + r, c, numbers, (*own, counts[0]))
        by_key = _lists(pair * counts[1] + c, r, numbers, (*own, counts[1]))
        return cls(shape, by_query, by_key, _int32(bits))

    @property
    def block(self) -> int:
        """Queries, and keys, of a tile."""
        return self.bits.shape[1]

    @property
    def batch(self) -> int:
        """Sequences that have a mask of their own; 1 where one serves all."""
        return self.by_query.starts.shape[0]

    @property
    def heads(self) -> int:
        """Query heads that have a mask of their own; 1 where one serves all."""
        return self.by_query.starts.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.bits.device

    @property
    def tensors(self) -> list[Tensor]:
        """The lists by query, those by key, and the bits, as the op takes them."""
        return [*self.by_query, *self.by_key, self.bits]

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor], shape: Sequence[int]) -> "BlockMask":
        """From `tensors` and `shape` of another."""
        by_query, by_key = Lists(*tensors[:2]), Lists(*tensors[2:4])
        return cls((shape[0], shape[1]), by_query, by_key, tensors[4])

    @property
    def density(self) -> float:
        """The part of all tiles that is computed, seen wholly or in part."""
        tiles = self.batch * self.heads * prod(_count(n, self.block) for n in self.shape)
        return self.by_query.entries.shape[0] / tiles

    def to(self, device: torch.device | str) -> "BlockMask":
        """The same mask on another device."""
        return self.of_tensors([x.to(device) for x in self.tensors], self.shape)

    def to_dense(self) -> Tensor:
        """Boolean `(B or 1, H or 1, Tq, Tk)`, True where the key is seen: for people and tests."""
        shape = (self.batch, self.heads, *(_count(n, self.block) for n in self.shape))
        dense = np.zeros((*shape, self.block, self.block), dtype=np.uint8)
        tiles, numbers = self._listed(shape[:2])
        dense[tuple(tiles.T)] = np.unpackbits(_with_full(self.bits)[numbers].view(np.uint8), axis=-1, bitorder="little")
        dense = dense.swapaxes(3, 4).reshape(*shape[:2], shape[2] * self.block, shape[3] * self.block)
        return torch.from_numpy(dense[:, :, : self.shape[0], : self.shape[1]]).bool().to(self.device)

    def __and__(self, other: "BlockMask") -> "BlockMask":
        """What both let be seen."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        same = ("shape", "block", "device")
        if any(getattr(self, name) != getattr(other, name) for name in same):
            raise ValueError(f"masks must have the same {', '.join(same)} to be combined, got {self!r} and {other!r}")
        own = np.broadcast_shapes((self.batch, self.heads), (other.batch, other.heads))
        (tiles, a), (other_tiles, b) = self._listed(own), other._listed(own)
        sizes = (*own, *(_count(n, self.block) for n in self.shape))
        places, other_places = (np.ravel_multi_index(tuple(x.T), sizes) for x in (tiles, other_tiles))
        _, in_a, in_b = np.intersect1d(places, other_places, assume_unique=True, return_indices=True)
        pairs, pair = np.unique(np.stack((a[in_a], b[in_b])), axis=1, return_inverse=True)
        distinct = _Distinct(self.block)
        numbers = distinct.numbers(_with_full(self.bits)[pairs[0]] & _with_full(other.bits)[pairs[1]])
        return self._assembled(tiles[in_a], numbers[pair.reshape(-1)], distinct.bits, self.shape, own).to(self.device)

    def _listed(self, own: tuple[int, ...]) -> tuple[Integers, Integers]:
        """Tiles (b, h, r, c) of `own` sequences and heads, in `by_query`'s order, and the numbers of their bits."""
        starts, entries = (x.cpu().numpy() for x in self.by_query)
        starts = np.broadcast_to(starts, (*own, starts.shape[2]))
        counts, lines = np.diff(starts).reshape(-1), np.indices((*own, starts.shape[2] - 1)).reshape(3, -1).T
        before = starts[..., :-1].reshape(-1) - (counts.cumsum() - counts)  # of entries, besides those of earlier lines
        listed = entries[np.repeat(before, counts) + np.arange(counts.sum())]
        return np.concatenate((np.repeat(lines, counts, axis=0), listed[:, :1]), axis=1), listed[:, 1]

    def __repr__(self) -> str:
        own = [f"{n} {name}" for n, name in ((self.batch, "sequences"), (self.heads, "heads")) if n != 1]
        of = f" of {' and '.join(own)}" if own else ""
        return f"BlockMask({self.shape[0]}×{self.shape[1]}{of}, block {self.block}, density {self.density:.2f})"


class _Distinct:
    """Tiles' bits, each kept once."""

    def __init__(self, block: int) -> None:
        self._shape = (block, block // 32)
        self._known: dict[bytes, int] = {}

    def numbers(self, words: Integers) -> Integers:
        """The number of each of the tiles `(n, block, block // 32)`, FULL or EMPTY."""
        full, seen = (words == -1).all((1, 2)), words.any((1, 2))
        numbers = np.where(full, FULL, EMPTY)
        for n in np.flatnonzero(seen & ~full):
            numbers[n] = self._known.setdefault(words[n].tobytes(), len(self._known))
        return numbers

    @property
    def bits(self) -> Integers:
        return np.frombuffer(b"".join(self._known), dtype=np.int32).reshape(-1, *self._shape)


def _with_full(bits: Tensor) -> Integers:
    """The bits with those of a full tile behind them, where FULL, -1, finds them."""
    words = bits.cpu().numpy()
    return np.concatenate((words, np.full_like(words, -1, shape=(1, *words.shape[1:]))))


def _lists(line: Integers, other: Integers, numbers: Integers, lines: tuple[int, ...]) -> Lists:
    order = np.lexsort((other, line))
    counts = np.bincount(line, minlength=prod(lines)).reshape(lines)
    ends = counts.cumsum().reshape(lines)
    starts = np.concatenate(((ends - counts)[..., :1], ends), axis=-1)
    return Lists(_int32(starts), _int32(np.stack((other, numbers), axis=1)[order]))


def _int32(x: Integers) -> Tensor:
    return torch.from_numpy(x.astype(np.int32))


def _count(length: int, block: int) -> int:
    """Lists along an axis: one at least, so that there is a list."""
    return max(-(-length // block), 1)


def _check_sizes(tq: int, tk: int, block: int) -> None:
    check_count("tq", tq)
    check_count("tk", tk)
    _check_block(block)


def _check_block(block: int) -> None:
    check_count("block", block)
    if block < SMALLEST_BLOCK or block & (block - 1):
        raise ValueError(f"block must be a power of two of at least {SMALLEST_BLOCK}, got {block}")


def _counts(name: str, lengths: Sequence[int] | Tensor) -> list[int]:
    counts: list[int] = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    for n in counts:
        check_count(f"each of {name}", n)
    return counts


def _check_window(window: Window) -> None:
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise ValueError(f"window must be a pair (left, right) of integers or None, got {window!r}")
    for name, side in zip(("left", "right"), window, strict=True):
        if side is not None:
            check_count(f"window's {name}", side)
