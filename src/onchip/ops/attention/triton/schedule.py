"""Which tile of which sequence a program works on, and how far the window lets it see."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Place(NamedTuple):
    """A sequence: its number, where it begins among the queries and the keys, and how long it is."""

    b: Any
    q_start: Any
    k_start: Any
    tq: Any
    tk: Any


class Window(NamedTuple):
    """How many keys to each side of its own a query sees; ignored where `Features` says it has no end."""

    left: Any
    right: Any


@triton.jit
def slot_of(cu, b, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The first slot of packed sequence b.

    Each sequence has at least as many slots as tiles, whatever the lengths, so nobody needs to count them beforehand.
    """
    return (tl.load(cu + b).to(tl.int64) * GROUP // BLOCK).to(tl.int32) + b


@triton.jit
def find(slot, cu, count, steps, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The packed sequence that a slot belongs to, and its tile there (which may lie beyond the end)."""
    low = slot * 0
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        before = slot_of(cu, middle, GROUP, BLOCK) <= slot
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low, slot - slot_of(cu, low, GROUP, BLOCK)


@triton.jit
def place_of(sequences, b, tq, tk):
    """Sequence b."""
    if sequences.ends is not None:
        stop, k_start = tl.load(sequences.ends + b).to(tl.int32), b * 0
        if sequences.starts is not None:
            k_start = tl.load(sequences.starts + b).to(tl.int32)
        return Place(b, b * 0, k_start, tq, stop - k_start)
    elif sequences.cu_q is None:
        return Place(b, b * 0, b * 0, tq, tk)
    else:
        q_start, q_stop = tl.load(sequences.cu_q + b), tl.load(sequences.cu_q + b + 1)
        k_start, k_stop = tl.load(sequences.cu_k + b), tl.load(sequences.cu_k + b + 1)
        return Place(b, q_start, k_start, (q_stop - q_start).to(tl.int32), (k_stop - k_start).to(tl.int32))


@triton.jit
def row_tile(slot, slots, sequences, tq, tk, F: tl.constexpr, BLOCK: tl.constexpr):
    """(sequence, tile, number of tiles) of a slot of rows; each sequence has `slots`, or packed what it needs.

    Under a causal mask the tiles are handed out from the last, which sees the most keys: none is left for the end.
    """
    if sequences.cu_q is None:
        b, tile = slot // slots, slot % slots
    else:
        b, tile = find(slot, sequences.cu_q, sequences.batch, sequences.steps, F.group, BLOCK)
    place = place_of(sequences, b, tq, tk)
    count = tl.cdiv(place.tq * F.group, BLOCK)
    if F.right:
        tile = count - 1 - tile
    return place, tile, (tile >= 0) & (tile < count)


@triton.jit
def key_tile(slot, slots, sequences, tq, tk, BLOCK: tl.constexpr):
    """The same for keys; under a causal mask the first keys are seen by the most queries, and come first."""
    if sequences.cu_q is None:
        b, tile = slot // slots, slot % slots
    else:
        b, tile = find(slot, sequences.cu_k, sequences.batch, sequences.steps, 1, BLOCK)
    place = place_of(sequences, b, tq, tk)
    return place, tile, tile < tl.cdiv(place.tk, BLOCK)


@triton.jit
def keys_seen(first, last, place, window, F: tl.constexpr, BLOCK: tl.constexpr):
    """The keys that queries first to last see, as (start, whole, ragged, stop).

    From start to whole, and from ragged to stop, are tiles of which some query may see a part only; between whole and
    ragged every query sees all. All but stop are multiples of BLOCK.
    """
    ahead = place.tk - place.tq
    start, whole, ragged, stop = 0 * ahead, 0 * ahead, place.tk, place.tk
    if F.left:
        start = tl.maximum(first + ahead - window.left, 0) // BLOCK * BLOCK
        whole = tl.cdiv(tl.maximum(last + ahead - window.left, 0), BLOCK) * BLOCK
    if F.right:
        ragged = tl.minimum(place.tk, first + ahead + window.right + 1)
        stop = tl.minimum(place.tk, last + ahead + window.right + 1)
    whole = tl.maximum(tl.minimum(whole, tl.cdiv(tl.maximum(stop, 0), BLOCK) * BLOCK), start)
    ragged = tl.maximum(tl.maximum(ragged, 0) // BLOCK * BLOCK, whole)
    return start, whole, ragged, stop


@triton.jit
def within(seen, first, last):
    """What `keys_seen` found, cut to the keys from first to last: multiples of its BLOCK, or the end."""
    start, whole, ragged, stop = seen
    start, stop = tl.maximum(start, first), tl.minimum(stop, last)
    return start, tl.minimum(tl.maximum(whole, first), last), tl.minimum(tl.maximum(ragged, first), last), stop


@triton.jit
def rows_seeing(first, last, place, window, F: tl.constexpr, BLOCK: tl.constexpr):
    """The rows that see keys first to last, in the same form."""
    ahead = place.tk - place.tq
    start, whole, ragged, stop = 0 * ahead, 0 * ahead, place.tq, place.tq
    if F.right:
        start = tl.maximum(first - window.right - ahead, 0) * F.group // BLOCK * BLOCK
        whole = tl.cdiv(tl.maximum(last - window.right - ahead, 0) * F.group, BLOCK) * BLOCK
    if F.left:
        ragged = tl.minimum(place.tq, first + window.left - ahead + 1)
        stop = tl.minimum(place.tq, last + window.left - ahead + 1)
    stop = tl.maximum(stop, 0) * F.group
    whole = tl.maximum(tl.minimum(whole, tl.cdiv(stop, BLOCK) * BLOCK), start)
    ragged = tl.maximum(tl.maximum(ragged, 0) * F.group // BLOCK * BLOCK, whole)
    return start, whole, ragged, stop
