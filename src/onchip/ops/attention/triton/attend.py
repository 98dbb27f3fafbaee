"""The forward kernel, which also decodes by splitting the keys, and the kernel that combines what the splits found.

The floor of a logit is 2·(D + Dv) operations of the matrix units and one exp2. At D 128 on an H100 that is 512 of the
4096 operations, and 1 of the 16 exponentials, that a multiprocessor does in a clock: exponentials cost half of what the
products cost, and want to overlap them. q and out cross to memory once, k and v once per tile of rows, from the L2
cache; in decoding the bytes of k and v are the floor. The kernel has been compiled and interpreted, and not run on a
GPU: where it stands against the floor is not known.
"""

import triton
import triton.language as tl

from onchip.ops.attention.triton import block_mask, dropout, pages, schedule, scores, softmax, tiles
from onchip.ops.attention.triton.arguments import Terms
from onchip.ops.attention.triton.schedule import Window
from onchip.ops.attention.triton.softmax import LN2


@triton.jit(do_not_specialize=["slots", "groups", "tq", "tk", "left", "right", "splits", "split_size"])
def attend(
    q,
    k,
    v,
    out,
    lse,
    bias,
    slopes,
    sinks,
    sequences,
    mask,
    slots,
    groups,
    tq,
    tk,
    left,
    right,
    splits,
    split_size,
    factors,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    JOIN: tl.constexpr,
):
    """A program computes the output and the log-sum-exp of BLOCK_M rows.

    SPLIT: of `split_size` keys only, and into `out[split]` and `lse[split]`, in float32 and in units of log 2.
    JOIN: without SPLIT, of all splits one after the other, joined as `combine` does: the same bits.
    """
    pid = tl.program_id(0)
    split, group, slot = pid % splits, pid // splits % groups, pid // splits // groups
    place, tile, exists = schedule.row_tile(slot, slots, sequences, tq, tk, F, BLOCK_M)
    if not exists:
        return
    window, terms = Window(left, right), Terms(bias, slopes, sinks)
    rows = scores.rows_of(tile * BLOCK_M + tl.arange(0, BLOCK_M), group, terms, place, F)
    time = place.q_start + rows.query
    first, last = tile * BLOCK_M // F.group, (tile * BLOCK_M + BLOCK_M - 1) // F.group
    seen = schedule.keys_seen(first, tl.minimum(last, place.tq - 1), place, window, F, BLOCK_N)
    given, kv_head = (k, v, sequences, mask, block_mask.list_of(mask, place, group, first, F)), group // F.shared
    q_start = tiles.offsets(q, place.b, time, rows.head)
    q_tile = tiles.load(q, q_start, rows.inside, F.head_dim, F.head_width, True)
    if SPLIT or not JOIN:
        if SPLIT:
            stop = tl.where(split == splits - 1, place.tk, split * split_size + split_size)  # however long it really is
            seen = schedule.within(seen, split * split_size, stop)
        result, logarithm = _part(
            seen, split == 0, q_tile, rows, given, terms, kv_head, place, window, factors, F, BLOCK_M, BLOCK_N
        )
    else:
        maximum, total = softmax.begin(None, rows.head, False, BLOCK_M)
        VALUE_WIDTH: tl.constexpr = F.value_width
        result = tl.zeros([BLOCK_M, VALUE_WIDTH], tl.float32)
        for begin in range(0, tl.maximum(seen[3], 1), split_size):
            of_part = schedule.within(seen, begin, begin + split_size)
            part, logarithm = _part(
                of_part, begin == 0, q_tile, rows, given, terms, kv_head, place, window, factors, F, BLOCK_M, BLOCK_N
            )
            maximum, total, result = softmax.join(maximum, total, result, logarithm, part)
        share, logarithm = softmax.finish(maximum, total)
        result *= share[:, None]

    out_start, lse_start = tiles.offsets(out, place.b, time, rows.head), tiles.offsets(lse, place.b, time, rows.head)
    if SPLIT:
        out_start += split.to(tl.int64) * out.split
        lse_start += split.to(tl.int64) * lse.split
    else:
        logarithm *= LN2
    tiles.store(out, out_start, rows.inside, result, F.value_dim, F.value_width)
    tl.store(lse.ptr + lse_start, logarithm, mask=rows.inside)


@triton.jit
def _part(
    seen, is_first, q_tile, rows, given, terms, kv_head, place, window, factors,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The output over the keys `seen`, and the log-sum-exp in units of log 2; the sink is in the first part."""
    start, whole, ragged, stop = block_mask.walk(given[3], given[4], seen, F)
    maximum, total = softmax.begin(terms.sinks, rows.head, is_first, BLOCK_M)
    VALUE_WIDTH: tl.constexpr = F.value_width
    carry = (maximum, total, tl.zeros([BLOCK_M, VALUE_WIDTH], tl.float32))
    if F.left:
        carry = _keys(
            carry, start, whole, q_tile, rows, given, terms, kv_head, place, window, factors, F, BLOCK_N, True
        )
    carry = _keys(carry, whole, ragged, q_tile, rows, given, terms, kv_head, place, window, factors, F, BLOCK_N, False)
    carry = _keys(carry, ragged, stop, q_tile, rows, given, terms, kv_head, place, window, factors, F, BLOCK_N, True)
    maximum, total, weighted = carry
    share, logarithm = softmax.finish(maximum, total)
    if F.dropout:
        share *= factors.kept
    return weighted * share[:, None], logarithm


@triton.jit
def _keys(
    carry, start, stop, q_tile, rows, given, terms, kv_head, place, window, factors,
    F: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attend to the keys at the positions from start to stop."""
    k, v, sequences, mask, entries = given
    maximum, total, weighted = carry
    factor = 1.0
    if F.folded:
        factor = factors.logit
    along = scores.along(rows, terms, 1)
    for position in range(start, stop, BLOCK_N):
        first, bits = block_mask.at(mask, entries, position, F)
        j = first + tl.arange(0, BLOCK_N)
        inside = j < place.tk
        b, time = pages.find(sequences, place, j, inside)
        k_start = tiles.offsets(k, b, time, kv_head)
        k_tile = tiles.load(k, k_start, inside, F.head_dim, F.head_width, MASKED)
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision=F.precision)
        s = scores.logits(products, along, j[None, :], terms, place, window, factors, F, MASKED)
        s = block_mask.hide(s, mask, bits, along.query, j[None, :], F)
        p, maximum, total, shrink = softmax.step(maximum, total, s, factor)
        if F.dropout:
            p = tl.where(dropout.kept(first, along, place, factors, BLOCK_N, False), p, 0.0)
        v_start = tiles.offsets(v, b, time, kv_head)
        v_tile = tiles.load(v, v_start, inside, F.value_dim, F.value_width, MASKED)
        weighted = tl.dot(p.to(v_tile.dtype), v_tile, weighted * shrink[:, None], input_precision=F.precision)
    return maximum, total, weighted


@triton.jit(do_not_specialize=["rows", "splits"])
def combine(parts, parts_lse, out, lse, rows, splits, heads, times, F: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the splits' outputs, weighted by their shares of the whole, over BLOCK rows of (b, time, head)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    head, time, b = row % heads, row // heads % times, row // heads // times
    maximum = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    VALUE_WIDTH: tl.constexpr = F.value_width
    weighted = tl.zeros([BLOCK, VALUE_WIDTH], tl.float32)
    part_start, lse_start = tiles.offsets(parts, b, time, head), tiles.offsets(parts_lse, b, time, head)
    for _ in range(splits):
        logarithm = tl.load(parts_lse.ptr + lse_start, mask=inside, other=-float("inf"))
        part = tiles.load(parts, part_start, inside, F.value_dim, F.value_width, True)
        maximum, total, weighted = softmax.join(maximum, total, weighted, logarithm, part)
        part_start += parts.split
        lse_start += parts_lse.split
    share, logarithm = softmax.finish(maximum, total)
    out_start = tiles.offsets(out, b, time, head)
    tiles.store(out, out_start, inside, weighted * share[:, None], F.value_dim, F.value_width)
    tl.store(lse.ptr + tiles.offsets(lse, b, time, head), logarithm * LN2, mask=inside)
