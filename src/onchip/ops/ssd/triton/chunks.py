"""What the kernels share: where a chunk lies, its steps and decays, and tiles of rows."""

import triton
import triton.language as tl


@triton.jit
def chunk_rows(chunks, chunk, SIZE: tl.constexpr):
    """A chunk's batch, its rows' times, and which of them there are."""
    if chunks.table is not None:
        batch = chunk * 0
        start = tl.load(chunks.table + chunk * 2)
        end = tl.load(chunks.table + chunk * 2 + 1)
    else:
        batch = chunk // chunks.per_sequence
        start = chunk % chunks.per_sequence * SIZE
        end = tl.minimum(start + SIZE, chunks.time)
    t = start + tl.arange(0, SIZE)
    return batch, t, t < end


@triton.jit
def sigmoid(x):
    """Its exponential is only taken of what is not positive."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def softplus(x):
    """log(1 + e) with e = exp(-|x|) as 2 artanh(e / (2 + e)), by its series, which has a small relative error."""
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    sum = tl.full(x.shape, 1 / 17, tl.float32)
    for k in tl.static_range(8):
        sum = sum * (s * s) + 1 / (15 - 2 * k)
    return tl.where(x > 20, x, tl.maximum(x, 0) + 2 * s * sum)


@triton.jit
def read_steps(steps, batch, t, seen, head, SOFTPLUS: tl.constexpr):
    """The steps, their derivatives with respect to dt, and the logarithms of their decays; 0 where there are none."""
    at = steps.dt + batch * steps.batch + t * steps.time + head * steps.head
    raw = tl.load(at, mask=seen, other=0).to(tl.float32)
    if steps.bias is not None:
        raw += tl.load(steps.bias + head)
    value = raw
    slope = tl.where(seen, 1.0, 0.0)
    if SOFTPLUS:
        value = softplus(raw)
        slope *= tl.where(raw > 20, 1.0, sigmoid(raw))
    slope = tl.where((value >= steps.low) & (value <= steps.high), slope, 0.0)
    value = tl.where(value < steps.low, steps.low, tl.where(value > steps.high, steps.high, value))
    value = tl.where(seen, value, 0.0)
    return value, slope, value * tl.load(steps.A + head)


@triton.jit
def decays(log, SIZE: tl.constexpr):
    """exp(Σ log[k] over j < k ≤ i) at (i, j), 0 above the diagonal: sums over a mask and not differences of sums."""
    i = tl.arange(0, SIZE)[:, None]
    j = tl.arange(0, SIZE)[None, :]
    sums = tl.cumsum(tl.where(i > j, log[:, None], 0.0), axis=0)
    return tl.where(i >= j, tl.exp(sums), 0.0)


@triton.jit
def decays_to_end(log, SIZE: tl.constexpr):
    """exp(Σ log[k] over k > j)."""
    i = tl.arange(0, SIZE)[:, None]
    j = tl.arange(0, SIZE)[None, :]
    return tl.exp(tl.sum(tl.where(i > j, log[:, None], 0.0), axis=0))


@triton.jit
def tile_of(x, batch, t, seen, head, columns, COUNT: tl.constexpr):
    """Addresses of rows' columns, and which of them there are."""
    at = x.ptr + batch * x.a + t[:, None].to(tl.int64) * x.b + head * x.c + columns[None, :].to(tl.int64) * x.d
    return at, seen[:, None] & (columns[None, :] < COUNT)


@triton.jit
def read_tile(x, batch, t, seen, head, columns, COUNT: tl.constexpr):
    """Rows' columns, 0 where there are none."""
    at, there = tile_of(x, batch, t, seen, head, columns, COUNT)
    return tl.load(at, mask=there, other=0)


@triton.jit
def write_tile(x, batch, t, seen, head, columns, values, COUNT: tl.constexpr):
    """Write rows' columns, in the tensor's dtype."""
    at, there = tile_of(x, batch, t, seen, head, columns, COUNT)
    tl.store(at, values.to(x.ptr.dtype.element_ty), mask=there)


@triton.jit
def state_tile(states, chunk, head, heads, p, n, DIM: tl.constexpr, STATE: tl.constexpr):
    """Addresses in a chunk's state, `(dim, state dim)`, and which of them there are."""
    at = states + ((chunk * heads + head) * DIM + p[:, None]) * STATE + n[None, :]
    return at, (p[:, None] < DIM) & (n[None, :] < STATE)
