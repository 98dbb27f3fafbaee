"""Each chunk's output, from its inputs and the state before it."""

import triton
import triton.language as tl

from onchip.ops.ssd.triton.chunks import chunk_rows, decays, read_steps, read_tile, sigmoid, state_tile, write_tile


@triton.jit
def chunk_products(
    B, C, batch, t, seen, head, chunk, heads, states,
    GROUP: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr, SIZE: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """C Bᵀ within the chunk, and C times the state before it."""
    products, before = tl.zeros([SIZE, SIZE], tl.float32), tl.zeros([SIZE, P], tl.float32)
    p = tl.arange(0, P)
    for begin in range(0, STATE, N):
        n = begin + tl.arange(0, N)
        c = read_tile(C, batch, t, seen, head // GROUP, n, STATE)
        b = read_tile(B, batch, t, seen, head // GROUP, n, STATE)
        at, there = state_tile(states, chunk, head, heads, p, n, DIM, STATE)
        state = tl.load(at, mask=there, other=0).to(c.dtype)
        products = tl.dot(c, tl.trans(b), products, input_precision=PRECISION)
        before = tl.dot(c, tl.trans(state), before, input_precision=PRECISION)
    return products, before


@triton.jit
def chunk_outputs(
    x, B, C, D, z, steps, chunks, states, out, heads,
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr,
    SIZE: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """from_start · C h + (C Bᵀ ∘ decay) u + D x, gated."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p = tl.arange(0, P)
    batch, t, seen = chunk_rows(chunks, chunk, SIZE)
    step, _slope, log = read_steps(steps, batch, t, seen, head, SOFTPLUS)
    products, y = chunk_products(
        B, C, batch, t, seen, head, chunk, heads, states, GROUP, DIM, STATE, SIZE, P, N, PRECISION
    )
    y *= tl.exp(tl.cumsum(log, axis=0))[:, None]
    x_tile = read_tile(x, batch, t, seen, head, p, DIM)
    weights = (products * decays(log, SIZE)).to(x_tile.dtype)
    y = tl.dot(weights, (x_tile.to(tl.float32) * step[:, None]).to(x_tile.dtype), y, input_precision=PRECISION)
    if D.ptr is not None:
        y += tl.load(D.ptr + head * D.a + p * D.b, mask=p < DIM, other=0)[None, :] * x_tile.to(tl.float32)
    if z.ptr is not None:
        gate = read_tile(z, batch, t, seen, head, p, DIM).to(tl.float32)
        y *= gate * sigmoid(gate)
    write_tile(out, batch, t, seen, head, p, y, DIM)


@triton.jit
def one_step(
    x, B, C, D, z, steps, state, out_state, y,
    SOFTPLUS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """A step of some rows of one head's state, which is read once and written once."""
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p = tl.program_id(2) * P + tl.arange(0, P)
    t, seen = tl.arange(0, 1), tl.full([1], True, tl.int1)
    step, _slope, log = read_steps(steps, batch, t, seen, head, SOFTPLUS)
    x_row = tl.load(x.ptr + batch * x.a + head * x.c + p * x.d, mask=p < DIM, other=0).to(tl.float32)
    sum = tl.zeros([P], tl.float32)
    for begin in range(0, STATE, N):
        n = begin + tl.arange(0, N)
        b = read_tile(B, batch, t, seen, head // GROUP, n, STATE).to(tl.float32)
        c = read_tile(C, batch, t, seen, head // GROUP, n, STATE).to(tl.float32)
        there = (p[:, None] < DIM) & (n[None, :] < STATE)
        at = state.ptr + batch * state.a + head * state.b + p[:, None] * state.c + n[None, :] * state.d
        h = tl.load(at, mask=there, other=0).to(tl.float32) * tl.exp(log)[:, None]
        h += (step * x_row)[:, None] * b
        at = out_state.ptr + batch * out_state.a + head * out_state.b + p[:, None] * out_state.c
        tl.store(at + n[None, :] * out_state.d, h, mask=there)
        sum += tl.sum(h * c, axis=1)
    if D.ptr is not None:
        sum += tl.load(D.ptr + head * D.a + p * D.b, mask=p < DIM, other=0) * x_row
    if z.ptr is not None:
        gate = tl.load(z.ptr + batch * z.a + head * z.c + p * z.d, mask=p < DIM, other=0).to(tl.float32)
        sum *= gate * sigmoid(gate)
    at = y.ptr + batch * y.a + head * y.c + p * y.d
    tl.store(at, sum.to(y.ptr.dtype.element_ty), mask=p < DIM)
