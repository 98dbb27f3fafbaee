"""A block mask in the kernels: a program walks the list of its tile, as if the tiles on it lay end to end.

Without a mask a position is a key (or a row) itself, and nothing of this is compiled. Under a mask a tile's rows are
queries of one head, and rows and keys of a tile lie within one tile of the mask.
"""

import triton
import triton.language as tl


@triton.jit
def list_of(mask, place, head, first, F: tl.constexpr):
    """(start, count) of the entries listed for the tile that begins at `first`."""
    if mask.starts is None:
        return first * 0, first * 0
    else:
        line = mask.starts + place.b.to(tl.int64) * mask.batch + head.to(tl.int64) * mask.head + first // F.block
        start = tl.load(line)
        return start.to(tl.int64), tl.load(line + 1) - start


@triton.jit
def walk(mask, entries, seen, F: tl.constexpr):
    """What `schedule.keys_seen` or `rows_seeing` found, as positions along the list."""
    if mask.starts is None:
        return seen
    else:
        start, whole, ragged, stop = seen
        start, whole = _position(mask, entries, start, F), _position(mask, entries, whole, F)
        return start, whole, _position(mask, entries, ragged, F), _position(mask, entries, stop, F)


@triton.jit
def _position(mask, entries, key, F: tl.constexpr):
    """How many keys of the listed tiles come before this one."""
    start, count = entries
    key = tl.maximum(key, 0)
    tile, low, high = key // F.block, count * 0, count
    for _ in range(mask.steps):
        middle = (low + high) // 2
        found = low < high
        before = tl.load(mask.entries + 2 * (start + middle), mask=found, other=0) < tile
        low = tl.where(found & before, middle + 1, low)
        high = tl.where(found & (before == 0), middle, high)
    listed = tl.load(mask.entries + 2 * (start + low), mask=low < count, other=-1) == tile
    return low * F.block + tl.where(listed, key % F.block, 0)


@triton.jit
def at(mask, entries, position, F: tl.constexpr):
    """The key at a position, and the number of its tile's bits, negative where all of it is seen."""
    if mask.starts is None:
        return position, position * 0
    else:
        entry = mask.entries + 2 * (entries[0] + position // F.block)
        return tl.load(entry) * F.block + position % F.block, tl.load(entry + 1)


@triton.jit
def hide(s, mask, bits, query, key, F: tl.constexpr):
    """The logits of queries and keys, -inf where the tile's bits are not set."""
    if mask.starts is None:
        return s
    else:
        WORDS: tl.constexpr = F.block // 32
        word = (bits.to(tl.int64) * F.block + query % F.block) * WORDS + key % F.block // 32
        words = tl.load(mask.bits + word, mask=word >= 0, other=-1)
        return tl.where(((words >> (key % 32)) & 1) != 0, s, -float("inf"))
