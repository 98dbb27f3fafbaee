"""The gradient of the bias: grad_s summed over what the bias is broadcast along, without atomics."""

import triton
import triton.language as tl

from onchip.ops.attention.triton import block_mask, gradients, schedule, scores
from onchip.ops.attention.triton.arguments import Terms
from onchip.ops.attention.triton.schedule import Window


@triton.jit(do_not_specialize=["batch", "heads", "own_batch", "own_heads", "tq", "tk", "left", "right"])
def grad_bias(
    q, k, v, grad_out, lse, delta, grad, bias, slopes, sinks, sequences, mask,
    batch, heads, own_batch, own_heads, tq, tk, left, right, factors,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PER_QUERY: tl.constexpr, PER_KEY: tl.constexpr,
):  # fmt: skip
    """Sum grad_s over a tile of queries and keys: over all keys without PER_KEY, all queries without PER_QUERY.

    `grad` (a `Bias`, float32) has own_batch sequences and own_heads heads: all, or one for all, which is summed here.
    """
    pid = tl.program_id(0)
    query_tiles, key_tiles = 1, 1
    if PER_QUERY:
        query_tiles = tl.cdiv(tq, BLOCK_M)
    if PER_KEY:
        key_tiles = tl.cdiv(tk, BLOCK_N)
    tile, owner = pid % (query_tiles * key_tiles), pid // (query_tiles * key_tiles)
    own_head, own_b = owner % own_heads, owner // own_heads
    first_query, first_key = tile % query_tiles * BLOCK_M, tile // query_tiles * BLOCK_N
    if PER_QUERY and PER_KEY:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    elif PER_QUERY:
        total = tl.zeros([BLOCK_M], tl.float32)
    else:
        total = tl.zeros([BLOCK_N], tl.float32)
    given = (q, grad_out, lse, delta)
    window, terms = Window(left, right), Terms(bias, slopes, sinks)
    for other_b in range(tl.where(own_batch == 1, batch, 1)):
        place = schedule.place_of(sequences, own_b + other_b, tq, tk)
        for other_head in range(tl.where(own_heads == 1, heads, 1)):
            total = _head(
                total, own_head + other_head, first_query, first_key, given, k, v, mask, terms, place, window,
                factors, F, BLOCK_M, BLOCK_N, PER_QUERY, PER_KEY,
            )  # fmt: skip
    query, key = first_query + tl.arange(0, BLOCK_M), first_key + tl.arange(0, BLOCK_N)
    start = grad.ptr + own_b.to(tl.int64) * grad.batch + own_head.to(tl.int64) * grad.head
    query_start, key_start = query.to(tl.int64) * grad.query, key.to(tl.int64) * grad.key
    if PER_QUERY and PER_KEY:
        inside = (query < tq)[:, None] & (key < tk)[None, :]
        tl.store(start + query_start[:, None] + key_start[None, :], total, mask=inside)
    elif PER_QUERY:
        tl.store(start + query_start, total, mask=query < tq)
    else:
        tl.store(start + key_start, total, mask=key < tk)


@triton.jit
def _head(
    total, head, first_query, first_key, given, k, v, mask, terms, place, window, factors,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PER_QUERY: tl.constexpr, PER_KEY: tl.constexpr,
):  # fmt: skip
    """Add one head of one sequence."""
    stop_query = place.tq
    if PER_QUERY:
        stop_query = tl.minimum(stop_query, first_query + BLOCK_M)
    for first in range(first_query, stop_query, BLOCK_M):
        row = (first + tl.arange(0, BLOCK_M)) * F.group + head % F.group
        rows = scores.rows_of(row, head // F.group, terms, place, F)
        q_tile, grad_tile, lse, delta = gradients.load_rows(given, rows, place, F, True)
        along = scores.along(rows, terms, 1)
        seen = schedule.keys_seen(first, tl.minimum(first + BLOCK_M, stop_query) - 1, place, window, F, BLOCK_N)
        if PER_KEY:
            seen = schedule.within(seen, first_key, first_key + BLOCK_N)
        entries = block_mask.list_of(mask, place, head, first, F)
        start, _whole, _ragged, stop = block_mask.walk(mask, entries, seen, F)
        for position in range(start, stop, BLOCK_N):
            first_j, bits = block_mask.at(mask, entries, position, F)
            j = first_j + tl.arange(0, BLOCK_N)
            k_tile, v_tile = gradients.load_keys(k, v, j, head // (F.group * F.shared), place, F, True)
            _products, _p, grad_s = gradients.score_gradient(
                q_tile, k_tile, grad_tile, v_tile, lse[:, None], delta[:, None],
                along, first_j, j[None, :], terms, place, window, factors, mask, bits, F, True,
            )  # fmt: skip
            if PER_QUERY and PER_KEY:
                total += grad_s
            elif PER_QUERY:
                total += tl.sum(grad_s, 1)
            else:
                total += tl.sum(grad_s, 0)
    return total
