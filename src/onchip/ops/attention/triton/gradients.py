"""The gradients of keys and values, and of queries: two kernels, so that nothing is summed by atomics.

Each recomputes the probabilities p from the saved log-sum-exp. With

    delta[i] = Σ_d grad_out[i, d] · out[i, d] - grad_lse[i]
    grad_s[i, j] = p[i, j] · (grad_out[i] · v[j] - delta[i])

the gradients are grad_v[j] = Σ_i p[i, j] · grad_out[i], grad_k[j] = scale · Σ_i grad_s[i, j] · q[i] and
grad_q[i] = scale · Σ_j grad_s[i, j] · k[j], the softcap's derivative times grad_s in the last two. Dropout's factors
multiply grad_v's p and the product with v[j], which here are zeroed where dropped and scaled. That is 7 matrix
products a tile where 5 would do if the kernels shared theirs; for it the sums have one order, the same on every run.
The floor is these products: twice the forward's for keys and values, 1.5 times for queries. The kernels have been
compiled and interpreted, and not run on a GPU.
"""

import triton
import triton.language as tl

from onchip.ops.attention.triton import block_mask, dropout, schedule, scores, tiles
from onchip.ops.attention.triton.arguments import Terms
from onchip.ops.attention.triton.schedule import Window
from onchip.ops.attention.triton.scores import LOG2E


@triton.jit(do_not_specialize=["rows", "heads", "times"])
def deltas(out, grad_out, grad_lse, delta, rows, heads, times, F: tl.constexpr, BLOCK: tl.constexpr):
    """delta of BLOCK rows of (b, time, head)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    head, time, b = row % heads, row // heads % times, row // heads // times
    out_tile = tiles.load(out, tiles.offsets(out, b, time, head), inside, F.value_dim, F.value_width, True)
    grad_start = tiles.offsets(grad_out, b, time, head)
    grad_tile = tiles.load(grad_out, grad_start, inside, F.value_dim, F.value_width, True)
    result = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    if grad_lse.ptr is not None:
        result -= tl.load(grad_lse.ptr + tiles.offsets(grad_lse, b, time, head), mask=inside, other=0.0)
    tl.store(delta.ptr + tiles.offsets(delta, b, time, head), result, mask=inside)


@triton.jit(do_not_specialize=["slots", "heads_kv", "tq", "tk", "left", "right"])
def keys_and_values(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, bias, slopes, sinks, sequences, mask,
    slots, heads_kv, tq, tk, left, right, factors,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program computes the gradients of BLOCK_N keys and values, over the rows of the whole group of heads."""
    pid = tl.program_id(0)
    kv_head, slot = pid % heads_kv, pid // heads_kv
    place, tile, exists = schedule.key_tile(slot, slots, sequences, tq, tk, BLOCK_N)
    if not exists:
        return
    window, terms = Window(left, right), Terms(bias, slopes, sinks)
    first_key = tile * BLOCK_N
    j = first_key + tl.arange(0, BLOCK_N)
    inside = j < place.tk
    k_tile, v_tile = load_keys(k, v, j, kv_head, place, F, True)
    held = (first_key, j, k_tile, v_tile)
    last = tl.minimum(first_key + BLOCK_N - 1, place.tk - 1)
    seen = schedule.rows_seeing(first_key, last, place, window, F, BLOCK_M)
    HEAD_WIDTH: tl.constexpr = F.head_width
    VALUE_WIDTH: tl.constexpr = F.value_width
    sums = (tl.zeros([BLOCK_N, HEAD_WIDTH], tl.float32), tl.zeros([BLOCK_N, VALUE_WIDTH], tl.float32))
    given = (q, grad_out, lse, delta)
    for member in range(F.shared):
        group = kv_head * F.shared + member
        entries = block_mask.list_of(mask, place, group, first_key, F)
        start, whole, ragged, stop = block_mask.walk(mask, entries, seen, F)
        listed = (mask, entries)
        if F.right:
            sums = _rows(
                sums, start, whole, held, given, listed, terms, group, place, window, factors, F, BLOCK_M, True
            )
        sums = _rows(sums, whole, ragged, held, given, listed, terms, group, place, window, factors, F, BLOCK_M, False)
        sums = _rows(sums, ragged, stop, held, given, listed, terms, group, place, window, factors, F, BLOCK_M, True)
    k_start = tiles.offsets(grad_k, place.b, place.k_start + j, kv_head)
    v_start = tiles.offsets(grad_v, place.b, place.k_start + j, kv_head)
    grad_keys, grad_values = sums
    if F.dropout:
        grad_values *= factors.kept
    tiles.store(grad_k, k_start, inside, grad_keys * factors.scale, F.head_dim, F.head_width)
    tiles.store(grad_v, v_start, inside, grad_values, F.value_dim, F.value_width)


@triton.jit
def _rows(
    sums, start, stop, held, given, listed, terms, group, place, window, factors,
    F: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the rows at these positions give. Keys beyond the last go along: what they gather is not stored."""
    grad_k, grad_v = sums
    first_key, j, k_tile, v_tile = held
    mask, entries = listed
    for position in range(start, stop, BLOCK_M):
        first, bits = block_mask.at(mask, entries, position, F)
        rows = scores.rows_of(first + tl.arange(0, BLOCK_M), group, terms, place, F)
        q_tile, grad_tile, lse, delta = load_rows(given, rows, place, F, MASKED)
        across = scores.along(rows, terms, 0)
        products, p, grad_s = score_gradient(
            k_tile, q_tile, v_tile, grad_tile, lse[None, :], delta[None, :],
            across, first_key, j[:, None], terms, place, window, factors, mask, bits, F, MASKED,
        )  # fmt: skip
        if F.softcap:
            grad_s *= scores.cap_derivative(products, factors)
        grad_v = tl.dot(p.to(grad_tile.dtype), grad_tile, grad_v, input_precision=F.precision)
        grad_k = tl.dot(grad_s.to(q_tile.dtype), q_tile, grad_k, input_precision=F.precision)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["slots", "groups", "tq", "tk", "left", "right"])
def queries(
    q, k, v, grad_out, lse, delta, grad_q, grad_slopes, bias, slopes, sinks, sequences, mask,
    slots, groups, tq, tk, left, right, factors,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program computes the gradients of BLOCK_M rows, and where asked what each gives to ALiBi's slope."""
    pid = tl.program_id(0)
    group, slot = pid % groups, pid // groups
    place, tile, exists = schedule.row_tile(slot, slots, sequences, tq, tk, F, BLOCK_M)
    if not exists:
        return
    window, terms = Window(left, right), Terms(bias, slopes, sinks)
    rows = scores.rows_of(tile * BLOCK_M + tl.arange(0, BLOCK_M), group, terms, place, F)
    held = load_rows((q, grad_out, lse, delta), rows, place, F, True)
    first, last = tile * BLOCK_M // F.group, (tile * BLOCK_M + BLOCK_M - 1) // F.group
    last = tl.minimum(last, place.tq - 1)
    entries = block_mask.list_of(mask, place, group, first, F)
    seen = schedule.keys_seen(first, last, place, window, F, BLOCK_N)
    start, whole, ragged, stop = block_mask.walk(mask, entries, seen, F)
    given, kv_head = (k, v, mask, entries), group // F.shared
    HEAD_WIDTH: tl.constexpr = F.head_width
    sums = (tl.zeros([BLOCK_M, HEAD_WIDTH], tl.float32), tl.zeros([BLOCK_M], tl.float32))
    rows_along = scores.along(rows, terms, 1)
    if F.left:
        sums = _keys(
            sums, start, whole, held, rows_along, given, terms, kv_head, place, window, factors, F, BLOCK_N, True
        )
    sums = _keys(
        sums, whole, ragged, held, rows_along, given, terms, kv_head, place, window, factors, F, BLOCK_N, False
    )
    sums = _keys(sums, ragged, stop, held, rows_along, given, terms, kv_head, place, window, factors, F, BLOCK_N, True)
    time = place.q_start + rows.query
    start = tiles.offsets(grad_q, place.b, time, rows.head)
    tiles.store(grad_q, start, rows.inside, sums[0] * factors.scale, F.head_dim, F.head_width)
    if grad_slopes.ptr is not None:
        tl.store(grad_slopes.ptr + tiles.offsets(grad_slopes, place.b, time, rows.head), -sums[1], mask=rows.inside)


@triton.jit
def _keys(
    sums, start, stop, held, rows, given, terms, kv_head, place, window, factors,
    F: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the keys at the positions from start to stop give."""
    grad_q, distances = sums
    q_tile, grad_tile, lse, delta = held
    k, v, mask, entries = given
    for position in range(start, stop, BLOCK_N):
        first, bits = block_mask.at(mask, entries, position, F)
        j = first + tl.arange(0, BLOCK_N)
        k_tile, v_tile = load_keys(k, v, j, kv_head, place, F, MASKED)
        products, _p, grad_s = score_gradient(
            q_tile, k_tile, grad_tile, v_tile, lse[:, None], delta[:, None],
            rows, first, j[None, :], terms, place, window, factors, mask, bits, F, MASKED,
        )  # fmt: skip
        if terms.slopes.ptr is not None:
            distances += tl.sum(grad_s * tl.abs(rows.position - j[None, :]).to(tl.float32), 1)
        if F.softcap:
            grad_s *= scores.cap_derivative(products, factors)
        grad_q = tl.dot(grad_s.to(k_tile.dtype), k_tile, grad_q, input_precision=F.precision)
    return grad_q, distances


@triton.jit
def load_rows(given, rows, place, F: tl.constexpr, CHECKED: tl.constexpr):
    """The rows' queries, output gradients, log-sum-exps in units of log 2, and deltas.

    A row that does not exist or sees nothing gets an infinite log-sum-exp: its probabilities come out as zero.
    """
    q, grad_out, lse, delta = given
    time = place.q_start + rows.query
    q_start, grad_start = tiles.offsets(q, place.b, time, rows.head), tiles.offsets(grad_out, place.b, time, rows.head)
    q_tile = tiles.load(q, q_start, rows.inside, F.head_dim, F.head_width, CHECKED)
    grad_tile = tiles.load(grad_out, grad_start, rows.inside, F.value_dim, F.value_width, CHECKED)
    if CHECKED:
        lse_row = tl.load(lse.ptr + tiles.offsets(lse, place.b, time, rows.head), mask=rows.inside, other=-float("inf"))
        delta_row = tl.load(delta.ptr + tiles.offsets(delta, place.b, time, rows.head), mask=rows.inside, other=0.0)
    else:
        lse_row = tl.load(lse.ptr + tiles.offsets(lse, place.b, time, rows.head))
        delta_row = tl.load(delta.ptr + tiles.offsets(delta, place.b, time, rows.head))
    return q_tile, grad_tile, tl.where(lse_row == -float("inf"), float("inf"), lse_row * LOG2E), delta_row


@triton.jit
def load_keys(k, v, j, kv_head, place, F: tl.constexpr, CHECKED: tl.constexpr):
    """Keys and values j."""
    inside = j < place.tk
    k_start = tiles.offsets(k, place.b, place.k_start + j, kv_head)
    v_start = tiles.offsets(v, place.b, place.k_start + j, kv_head)
    k_tile = tiles.load(k, k_start, inside, F.head_dim, F.head_width, CHECKED)
    return k_tile, tiles.load(v, v_start, inside, F.value_dim, F.value_width, CHECKED)


@triton.jit
def score_gradient(
    a, b, grad_a, grad_b, lse, delta, rows, first, j, terms, place, window, factors, mask, bits,
    F: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(products, p, grad_s) of a tile whose keys j begin at `first`; p is zero where dropped.

    a, b are queries and keys, grad_a, grad_b their output gradients and values; exchanged, the tile comes transposed.
    """
    factor = 1.0
    if F.folded:
        factor = factors.logit
    products = tl.dot(a, tl.trans(b), input_precision=F.precision)
    s = scores.logits(products, rows, j, terms, place, window, factors, F, MASKED)
    s = block_mask.hide(s, mask, bits, rows.query, j, F)
    p = tl.exp2(s * factor - lse)
    grad_p = tl.dot(grad_a, tl.trans(grad_b), input_precision=F.precision)
    if F.dropout:
        KEYS_FIRST: tl.constexpr = j.shape[1] == 1
        kept = dropout.kept(first, rows, place, factors, j.shape[0] * j.shape[1], KEYS_FIRST)
        grad_s = p * (tl.where(kept, grad_p * factors.kept, 0.0) - delta)
        return products, tl.where(kept, p, 0.0), grad_s
    else:
        return products, p, p * (grad_p - delta)
