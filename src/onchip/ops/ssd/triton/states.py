"""What each chunk adds to the state, and the passing of states from chunk to chunk; of gradients, too."""

import triton
import triton.language as tl

from onchip.ops.ssd.triton.chunks import (
    chunk_rows,
    decays_to_end,
    read_steps,
    read_tile,
    sigmoid,
    state_tile,
)


@triton.jit
def chunk_states(
    left, gate, right, steps, chunks, states, wholes, heads,
    BACKWARD: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    STATE: tl.constexpr, SIZE: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Σ_t factor[t] · left[t] ⊗ right[t]: of x and B, decayed to the end, or of y's gradient and C, from the start."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p, n = tl.arange(0, P), tl.program_id(2) * N + tl.arange(0, N)
    batch, t, seen = chunk_rows(chunks, chunk, SIZE)
    step, _slope, log = read_steps(steps, batch, t, seen, head, SOFTPLUS)
    if tl.program_id(2) == 0:
        tl.store(wholes + chunk * heads + head, tl.exp(tl.sum(log, axis=0)))
    a = read_tile(left, batch, t, seen, head, p, DIM)
    weighed = a.to(tl.float32)
    if gate.ptr is not None:
        z = read_tile(gate, batch, t, seen, head, p, DIM).to(tl.float32)
        weighed *= z * sigmoid(z)
    if BACKWARD:
        weighed *= tl.exp(tl.cumsum(log, axis=0))[:, None]
    else:
        weighed *= (step * decays_to_end(log, SIZE))[:, None]
    b = read_tile(right, batch, t, seen, head // GROUP, n, STATE)
    at, there = state_tile(states, chunk, head, heads, p, n, DIM, STATE)
    tl.store(at, tl.dot(tl.trans(weighed.to(b.dtype)), b, input_precision=PRECISION), mask=there)


@triton.jit
def pass_states(
    states, wholes, chunks, initial, final, heads,
    BACKWARD: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replaces what each chunk adds by the state it starts from: the one before it, or backward the one after it."""
    sequence, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = element < DIM * STATE
    if chunks.firsts is not None:
        first, end = tl.load(chunks.firsts + sequence), tl.load(chunks.firsts + sequence + 1)
    else:
        first, end = sequence * chunks.per_sequence, (sequence + 1) * chunks.per_sequence
    inside = (element // STATE).to(tl.int64) * initial.c + (element % STATE).to(tl.int64) * initial.d
    state = tl.zeros([BLOCK], tl.float32)
    if initial.ptr is not None:
        at = initial.ptr + sequence * initial.a + head * initial.b + inside
        state += tl.load(at, mask=there, other=0).to(tl.float32)
    for i in range(end - first):
        chunk = first + i
        if BACKWARD:
            chunk = end - 1 - i
        at = states + (chunk * heads + head) * DIM * STATE + element
        added = tl.load(at, mask=there, other=0)
        tl.store(at, state, mask=there)
        state = tl.load(wholes + chunk * heads + head) * state + added
    if final.ptr is not None:
        inside = (element // STATE).to(tl.int64) * final.c + (element % STATE).to(tl.int64) * final.d
        at = final.ptr + sequence * final.a + head * final.b + inside
        tl.store(at, state.to(final.ptr.dtype.element_ty), mask=there)
