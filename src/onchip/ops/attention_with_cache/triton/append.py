"""New keys and values put into the cache, keys and queries turned, in Triton: one launch for all of it."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from onchip.ops._triton import Launch
from onchip.ops.attention_with_cache.arguments import Call

_HEADS = 8  # of a program


class Heads(NamedTuple):
    """A `(B, T, H, D)` tensor, or `(pages, page size, H, D)`, with its strides."""

    ptr: Any
    heads: int
    batch: int
    time: int
    head: int
    feature: int

    @classmethod
    def of(cls, x: Tensor) -> "Heads":
        """Of a tensor of any strides."""
        return cls(x, x.shape[2], *x.stride())


class Places(NamedTuple):
    """How many keys each row has, and the pages where they lie, if they do, `line` and `entry` apart in the table."""

    lengths: Any
    table: Any
    line: int
    entry: int
    page_size: int

    @classmethod
    def of(cls, call: Call) -> "Places":
        """Those of a call."""
        line, entry = (0, 0) if call.block_table is None else call.block_table.stride()
        return cls(call.cache_seqlens.contiguous(), call.block_table, line, entry, call.k_cache.shape[1])


class Turns(NamedTuple):
    """Tables of cosines and sines, and each row's first position if it is not its length; None without rotation."""

    cos: Any
    sin: Any
    positions: Any
    cos_position: int
    cos_pair: int
    sin_position: int
    sin_pair: int

    @classmethod
    def of(cls, call: Call) -> "Turns":
        """Those of a call."""
        if call.rotary_cos is None or call.rotary_sin is None:
            return cls(None, None, None, 0, 0, 0, 0)
        positions = None if call.rotary_seqlens is None else call.rotary_seqlens.contiguous()
        return cls(call.rotary_cos, call.rotary_sin, positions, *call.rotary_cos.stride(), *call.rotary_sin.stride())


class Token(NamedTuple):
    """Where one is in a tensor."""

    batch: Any
    time: Any


@triton.jit
def _move(
    x, at, to, there, turns, position, DIM: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Heads of one token from x to another tensor, the first 2·PAIRS features turned."""
    head = (tl.program_id(2) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    d = tl.arange(0, WIDTH)[None, :]
    inside = (head < x.heads) & (d < DIM)
    row = x.ptr + at.batch * x.batch + at.time * x.time + head * x.head
    y = tl.load(row + d * x.feature, mask=inside, other=0)
    if PAIRS > 0:
        if INTERLEAVED:
            pair, first, other = d // 2, d % 2 == 0, d ^ 1
        else:
            pair, first, other = d % PAIRS, d < PAIRS, (d + PAIRS) % (2 * PAIRS)
        turning = d < 2 * PAIRS
        b = tl.load(row + other * x.feature, mask=inside & turning, other=0).to(tl.float32)
        cos = tl.load(turns.cos + position * turns.cos_position + pair * turns.cos_pair, mask=turning, other=1)
        sin = tl.load(turns.sin + position * turns.sin_position + pair * turns.sin_pair, mask=turning, other=0)
        y = y.to(tl.float32) * cos.to(tl.float32) + tl.where(first, -b, b) * sin.to(tl.float32)
    start = to.ptr + there.batch * to.batch + there.time * to.time + head * to.head
    tl.store(start + d * to.feature, y.to(to.ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["added", "queries"])
def _append(
    q, turned, k, v, k_cache, v_cache, places, turns, added, queries, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    IN_ORDER: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = Token(b, t)
    before = tl.load(places.lengths + b).to(tl.int64)
    position = before
    if turns.positions is not None:
        position = tl.load(turns.positions + b).to(tl.int64)
    if t < added:
        row, time = b, before + t
        if places.table is not None:
            page = tl.load(places.table + b * places.line + time // places.page_size * places.entry)
            row, time = page.to(tl.int64), time % places.page_size
        there = Token(row, time)
        _move(k, at, k_cache, there, turns, position + t, DIM, WIDTH, PAIRS, INTERLEAVED, HEADS)
        _move(v, at, v_cache, there, turns, position, VALUE_DIM, VALUE_WIDTH, 0, INTERLEAVED, HEADS)
    if t < queries:
        if IN_ORDER:
            position += t
        _move(q, at, turned, at, turns, position, DIM, WIDTH, PAIRS, INTERLEAVED, HEADS)


def launch(call: Call, k: Tensor, v: Tensor, turned: Tensor) -> Launch:
    """The launch that writes k and v to the call's cache and its queries, if there is a rotation, to `turned`."""
    pairs = 0 if call.rotary_cos is None else call.rotary_cos.shape[1]
    queries, heads = (call.q.shape[1], max(call.q.shape[2], k.shape[2])) if pairs else (0, k.shape[2])
    dims = k.shape[3], v.shape[3]
    tensors = map(Heads.of, (call.q, turned, k, v, call.k_cache, call.v_cache))
    widths = map(triton.next_power_of_2, dims)
    sizes = (call.added, queries, *dims, *widths, pairs, call.rotary_interleaved, call.in_order, _HEADS)
    grid = (max(call.added, queries), k.shape[0], triton.cdiv(heads, _HEADS))
    return Launch(_append, grid, (*tensors, Places.of(call), Turns.of(call), *sizes))
