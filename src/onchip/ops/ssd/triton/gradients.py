"""Each chunk's gradients, from its inputs, the state before it and the gradient of the state after it.

A program is one head's chunk. What is a sum over heads, over time or over the batch it leaves in a place of its own:
the sums are taken afterwards, in one order, without atomics.
"""

import triton
import triton.language as tl

from onchip.ops.ssd.triton.chunks import (
    chunk_rows,
    decays,
    decays_to_end,
    read_steps,
    read_tile,
    sigmoid,
    state_tile,
    write_tile,
)
from onchip.ops.ssd.triton.outputs import chunk_products


@triton.jit
def chunk_gradients(
    x, B, C, D, z, steps, chunks, grad_out, states, grad_states, heads,
    grad_x, grad_dt, grad_B, grad_C, grad_z, sums, grad_D,
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr,
    SIZE: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """All gradients of one head's chunk, but that of the state before it."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p = tl.arange(0, P)
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    batch, t, seen = chunk_rows(chunks, chunk, SIZE)
    step, slope, log = read_steps(steps, batch, t, seen, head, SOFTPLUS)
    decay = decays(log, SIZE)
    from_start, to_end = tl.exp(tl.cumsum(log, axis=0)), decays_to_end(log, SIZE)
    x_tile = read_tile(x, batch, t, seen, head, p, DIM)
    wide_x = x_tile.to(tl.float32)
    u = (wide_x * step[:, None]).to(x_tile.dtype)
    grad_y = read_tile(grad_out, batch, t, seen, head, p, DIM).to(tl.float32)
    products, before = chunk_products(
        B, C, batch, t, seen, head, chunk, heads, states, GROUP, DIM, STATE, SIZE, P, N, PRECISION
    )
    weights = products * decay
    skip = tl.zeros([P], tl.float32)
    if D.ptr is not None:
        skip += tl.load(D.ptr + head * D.a + p * D.b, mask=p < DIM, other=0)
    if z.ptr is not None:
        gate = read_tile(z, batch, t, seen, head, p, DIM).to(tl.float32)
        open = sigmoid(gate)
        y = tl.dot(weights.to(u.dtype), u, before * from_start[:, None], input_precision=PRECISION)
        y += skip[None, :] * wide_x
        write_tile(grad_z, batch, t, seen, head, p, grad_y * y * open * (1 + gate * (1 - open)), DIM)
        grad_y *= gate * open
    grad = grad_y.to(x_tile.dtype)
    grad_weights = tl.dot(grad, tl.trans(u), input_precision=PRECISION)
    # A step's log-decay is in every (i, j) with j < k ≤ i; and in from_start of all from k on, to_end of all before k.
    pairs = tl.cumsum(tl.where(i > j, grad_weights * weights, 0.0), axis=0, reverse=True)
    rate = tl.sum(tl.where(i > j, pairs, 0.0), axis=1)
    grad_products = (grad_weights * decay).to(x_tile.dtype)
    grad_u = tl.dot(tl.trans(weights.to(x_tile.dtype)), grad, input_precision=PRECISION)
    from_c, from_b = tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32)
    whole = tl.zeros([P], tl.float32)
    for begin in range(0, STATE, N):
        n = begin + tl.arange(0, N)
        c = read_tile(C, batch, t, seen, head // GROUP, n, STATE)
        b = read_tile(B, batch, t, seen, head // GROUP, n, STATE)
        at, there = state_tile(states, chunk, head, heads, p, n, DIM, STATE)
        state = tl.load(at, mask=there, other=0)
        at, there = state_tile(grad_states, chunk, head, heads, p, n, DIM, STATE)
        grad_state = tl.load(at, mask=there, other=0)
        whole += tl.sum(state * grad_state, axis=1)
        decayed = (b.to(tl.float32) * to_end[:, None]).to(b.dtype)
        grad_u = tl.dot(decayed, tl.trans(grad_state.to(b.dtype)), grad_u, input_precision=PRECISION)
        through = tl.dot(grad, state.to(c.dtype), input_precision=PRECISION) * from_start[:, None]
        from_c += tl.sum(through * c.to(tl.float32), axis=1)
        through = tl.dot(grad_products, b, through, input_precision=PRECISION)
        write_tile(grad_C, batch, t, seen, head, n, through, STATE)
        through = tl.dot(u, grad_state.to(b.dtype), input_precision=PRECISION) * to_end[:, None]
        from_b += tl.sum(through * b.to(tl.float32), axis=1)
        through = tl.dot(tl.trans(grad_products), c, through, input_precision=PRECISION)
        write_tile(grad_B, batch, t, seen, head, n, through, STATE)
    write_tile(grad_x, batch, t, seen, head, p, grad_u * step[:, None] + skip[None, :] * grad_y, DIM)
    rate += tl.sum(tl.where(i > j, from_b[None, :], from_c[None, :]), axis=1)
    rate += tl.exp(tl.sum(log, axis=0)) * tl.sum(whole, axis=0)
    wide_x = read_tile(x, batch, t, seen, head, p, DIM).to(tl.float32)
    grad_raw = (tl.sum(wide_x * grad_u, axis=1) + tl.load(steps.A + head) * rate) * slope
    at = grad_dt.ptr + batch * grad_dt.a + t.to(tl.int64) * grad_dt.b + head * grad_dt.c
    tl.store(at, grad_raw.to(grad_dt.ptr.dtype.element_ty), mask=seen)
    at = sums + (chunk * heads + head) * 2
    tl.store(at, tl.sum(step * rate, axis=0))
    tl.store(at + 1, tl.sum(grad_raw, axis=0))
    if D.ptr is not None:
        at = grad_D + (chunk * heads + head) * DIM + p
        tl.store(at, tl.sum(wide_x * grad_y, axis=0), mask=p < DIM)
