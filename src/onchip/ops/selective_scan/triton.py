"""The selective scan in Triton: a program takes a block of channels of one sequence, tile after tile of tokens.

A tile is three-dimensional, (tokens, channels, states), and its recurrence an associative scan along tokens, which lie
in the registers of a thread; the state is carried from tile to tile. The backward pass starts every chunk from the
state that was saved before it, and goes through its tiles from the last to the first. What the channels of a group add
to the gradients of B and C is summed by block, and the blocks in their order: no atomics, the same bits on every run.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from onchip.ops._sequence import boundaries
from onchip.ops._triton import Launch, on_device_of
from onchip.ops.selective_scan.arguments import CHUNK, Call

_TILE = 16  # tokens
_PLANE = 256  # channels times states of a program: one of a thread of eight warps


class Tokens(NamedTuple):
    """A tensor `(batch, time, channels)`, or None, and its strides."""

    ptr: Any
    batch: int
    time: int
    channel: int


class Groups(NamedTuple):
    """A tensor `(batch, time, groups, states)` and its strides."""

    ptr: Any
    batch: int
    time: int
    group: int
    state: int


class Shape(NamedTuple):
    """Sizes of a call; `starts` are packed sequences' boundaries, or None where each of a batch has `time` tokens."""

    starts: Any
    time: int
    tokens: int
    channels: int
    states: int
    group_size: int


class Parameters(NamedTuple):
    """Contiguous float32: `(channels, states)`, and twice `(channels,)` or None."""

    A: Any
    D: Any
    dt_bias: Any


class Block(NamedTuple):
    """Where a program is: its first token of its row of the batch and of all, its channels, its group."""

    sequence: Any
    batch: Any
    start: Any
    row: Any
    length: Any
    group: Any
    channel: Any
    inside: Any


@triton.jit
def _compose(decay, state, next_decay, next_state):
    return decay * next_decay, next_decay * state + next_state


@triton.jit
def _place(shape, WIDTH: tl.constexpr):
    """Its sequence, the first token in the batch's row and among all, the length, and its channels."""
    blocks = tl.cdiv(shape.group_size, WIDTH)
    group = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    sequence = tl.program_id(1).to(tl.int64)
    if shape.starts is None:
        batch, start, row, length = sequence, sequence * 0, sequence * shape.time, sequence * 0 + shape.time
    else:
        start = tl.load(shape.starts + sequence).to(tl.int64)
        batch, row, length = sequence * 0, start, tl.load(shape.starts + sequence + 1).to(tl.int64) - start
    channel = group * shape.group_size + column
    return Block(
        sequence, batch, start, row, length, group.to(tl.int64), channel.to(tl.int64), column < shape.group_size
    )


@triton.jit
def _saved(at, shape, CHUNK: tl.constexpr):
    """The row of a sequence's first state among those saved: see `Call.results`."""
    row = at.sequence * tl.cdiv(shape.time, CHUNK)
    if shape.starts is not None:
        row = at.row // CHUNK + at.sequence
    return row


@triton.jit
def _load(x, at, t):
    """(tokens, channels) in float32, zeros beyond."""
    offset = at.batch * x.batch + (at.start + t)[:, None] * x.time + at.channel[None, :] * x.channel
    mask = ((t >= 0) & (t < at.length))[:, None] & at.inside[None, :]
    return tl.load(x.ptr + offset, mask=mask, other=0).to(tl.float32)


@triton.jit
def _load_group(x, at, t, states, n):
    """(tokens, states) in float32, zeros beyond."""
    offset = (
        at.batch * x.batch + (at.start + t)[:, None] * x.time + at.group * x.group + n.to(tl.int64)[None, :] * x.state
    )
    mask = ((t >= 0) & (t < at.length))[:, None] & (n < states)[None, :]
    return tl.load(x.ptr + offset, mask=mask, other=0).to(tl.float32)


@triton.jit
def _store(ptr, at, t, channels, value):
    """To a contiguous `(tokens, channels)`."""
    offset = (at.row + t)[:, None] * channels + at.channel[None, :]
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=(t < at.length)[:, None] & at.inside[None, :])


@triton.jit
def _raw_steps(dt, dt_bias, at, t):
    raw = _load(dt, at, t)
    if dt_bias is not None:
        raw += tl.load(dt_bias + at.channel, mask=at.inside, other=0)[None, :]
    return raw


@triton.jit
def _steps(raw, at, t, SOFTPLUS: tl.constexpr):
    """How far tokens move the time; not at all beyond the sequence, where the state so stays as it is."""
    if SOFTPLUS:
        small = tl.exp(-tl.abs(raw))
        # log(1 + small), where 1 + small loses the digits of a small one.
        grown = 1.0 + small
        log1p = tl.where(grown == 1.0, small, tl.log(grown) * (small / tl.where(grown == 1.0, 1.0, grown - 1.0)))
        raw = tl.where(raw > 20.0, raw, tl.maximum(raw, 0.0) + log1p)
    return tl.where(((t >= 0) & (t < at.length))[:, None] & at.inside[None, :], raw, 0.0)


@triton.jit
def _decays(steps, A):
    return tl.exp2(steps[:, :, None] * A[None, :, :])


@triton.jit
def _states(before, decays, inputs, TILE: tl.constexpr):
    """The states after each token of a tile, `before` the one before it."""
    first = (tl.arange(0, TILE) == 0)[:, None, None]
    _, states = tl.associative_scan(
        (decays, tl.where(first, decays * before[None, :, :] + inputs, inputs)), 0, _compose
    )
    return states


@triton.jit
def _row(x, row, TILE: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, TILE) == row)[:, None, None], x, 0.0), 0)


@triton.jit
def _forward(
    x,
    dt,
    z,
    B,
    C,
    parameters,
    initial,
    out,
    final,
    checkpoints,
    shape,
    SOFTPLUS: tl.constexpr,
    WIDTH: tl.constexpr,
    STATES: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    at = _place(shape, WIDTH)
    n = tl.arange(0, STATES)
    plane = at.channel[:, None] * shape.states + n[None, :]
    mask = at.inside[:, None] & (n < shape.states)[None, :]
    A = tl.load(parameters.A + plane, mask=mask, other=0) * 1.4426950408889634
    size = shape.channels * shape.states
    state = tl.zeros([WIDTH, STATES], tl.float32)
    if initial is not None:
        state = tl.load(initial + at.sequence * size + plane, mask=mask, other=0)
    saved = _saved(at, shape, CHUNK)
    for begin in range(0, at.length, TILE):
        if checkpoints is not None:
            row = (saved + begin // CHUNK) * size + n.to(tl.int64)[None, :] * shape.channels + at.channel[:, None]
            tl.store(checkpoints + row, state, mask=mask & (begin % CHUNK == 0))
        t = begin + tl.arange(0, TILE)
        steps = _steps(_raw_steps(dt, parameters.dt_bias, at, t), at, t, SOFTPLUS)
        xs = _load(x, at, t)
        into, out_of = _load_group(B, at, t, shape.states, n), _load_group(C, at, t, shape.states, n)
        h = _states(state, _decays(steps, A), (steps * xs)[:, :, None] * into[:, None, :], TILE)
        y = tl.sum(h * out_of[:, None, :], 2)
        if parameters.D is not None:
            y += xs * tl.load(parameters.D + at.channel, mask=at.inside, other=0)[None, :]
        if z.ptr is not None:
            gate = _load(z, at, t)
            y *= gate * tl.sigmoid(gate)
        _store(out, at, t, shape.channels, y)
        state = _row(h, TILE - 1, TILE)
    tl.store(final + at.sequence * size + plane, state, mask=mask)


@triton.jit
def _backward(
    x,
    dt,
    z,
    B,
    C,
    parameters,
    checkpoints,
    grad_out,
    grad_final,
    shape,
    grad_x,
    grad_dt,
    grad_z,
    grad_A,
    grad_B,
    grad_C,
    grad_D,
    grad_bias,
    grad_initial,
    SOFTPLUS: tl.constexpr,
    WIDTH: tl.constexpr,
    STATES: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    at = _place(shape, WIDTH)
    n = tl.arange(0, STATES)
    plane = at.channel[:, None] * shape.states + n[None, :]
    mask = at.inside[:, None] & (n < shape.states)[None, :]
    A = tl.load(parameters.A + plane, mask=mask, other=0) * 1.4426950408889634
    size = shape.channels * shape.states
    weight = tl.zeros([WIDTH], tl.float32)
    if parameters.D is not None:
        weight = tl.load(parameters.D + at.channel, mask=at.inside, other=0)
    carry = tl.zeros([WIDTH, STATES], tl.float32)
    if grad_final is not None:
        carry = tl.load(grad_final + at.sequence * size + plane, mask=mask, other=0)
    sum_A, sum_D, sum_bias = carry * 0.0, weight * 0.0, weight * 0.0
    tiles = tl.cdiv(at.length, TILE)
    for i in range(tiles):
        begin = (tiles - 1 - i) * TILE
        t = begin + tl.arange(0, TILE)
        # The states before each of the tile's tokens: those after the tokens one earlier, from the chunk's start on.
        chunk = begin // CHUNK * CHUNK
        row = (_saved(at, shape, CHUNK) + begin // CHUNK) * size
        row += n.to(tl.int64)[None, :] * shape.channels + at.channel[:, None]
        state = tl.load(checkpoints + row, mask=mask, other=0)
        for earlier in range(chunk, begin, TILE):
            s = earlier + tl.arange(0, TILE)
            steps = _steps(_raw_steps(dt, parameters.dt_bias, at, s), at, s, SOFTPLUS)
            inputs = (steps * _load(x, at, s))[:, :, None] * _load_group(B, at, s, shape.states, n)[:, None, :]
            state = _row(_states(state, _decays(steps, A), inputs, TILE), TILE - 1, TILE)
        s = tl.where(t == begin, -1, t - 1)  # nothing comes before the first: it finds the state as it is
        steps = _steps(_raw_steps(dt, parameters.dt_bias, at, s), at, s, SOFTPLUS)
        inputs = (steps * _load(x, at, s))[:, :, None] * _load_group(B, at, s, shape.states, n)[:, None, :]
        before = _states(state, _decays(steps, A), inputs, TILE)
        raw = _raw_steps(dt, parameters.dt_bias, at, t)
        steps = _steps(raw, at, t, SOFTPLUS)
        xs = _load(x, at, t)
        into, out_of = _load_group(B, at, t, shape.states, n), _load_group(C, at, t, shape.states, n)
        decayed = _decays(steps, A) * before
        h = decayed + (steps * xs)[:, :, None] * into[:, None, :]
        grad = _load(grad_out, at, t)
        if z.ptr is not None:
            gate = _load(z, at, t)
            sigmoid = tl.sigmoid(gate)
            y = tl.sum(h * out_of[:, None, :], 2) + xs * weight[None, :]
            _store(grad_z, at, t, shape.channels, grad * y * sigmoid * (1.0 + gate * (1.0 - sigmoid)))
            grad *= gate * sigmoid
        # The states' gradients: the recurrence backwards, with the decays of the tokens one later.
        later = _steps(_raw_steps(dt, parameters.dt_bias, at, t + 1), at, t + 1, SOFTPLUS)
        decays = _decays(later, A)
        given = grad[:, :, None] * out_of[:, None, :]
        last = (tl.arange(0, TILE) == TILE - 1)[:, None, None]
        given = tl.where(last, decays * carry[None, :, :] + given, given)
        _, g = tl.associative_scan((decays, given), 0, _compose, reverse=True)
        carry = _row(g, 0, TILE)
        to_input = tl.sum(g * into[:, None, :], 2)
        exponents = g * decayed
        sum_A += tl.sum(exponents * steps[:, :, None], 0)
        to_step = xs * to_input + tl.sum(exponents * A[None, :, :], 2) * 0.6931471805599453
        if SOFTPLUS:
            to_step *= tl.where(raw > 20.0, 1.0, tl.sigmoid(raw))
        sum_D += tl.sum(grad * xs, 0)
        sum_bias += tl.sum(tl.where((t < at.length)[:, None], to_step, 0.0), 0)
        _store(grad_x, at, t, shape.channels, steps * to_input + grad * weight[None, :])
        _store(grad_dt, at, t, shape.channels, to_step)
        partial = (tl.program_id(0).to(tl.int64) * shape.tokens + at.row + t)[:, None] * shape.states + n[None, :]
        real = (t < at.length)[:, None] & (n < shape.states)[None, :]
        tl.store(grad_B + partial, tl.sum(g * (steps * xs)[:, :, None], 1), mask=real)
        tl.store(grad_C + partial, tl.sum(h * grad[:, :, None], 1), mask=real)
    tl.store(grad_A + at.sequence * size + plane, sum_A, mask=mask)
    tl.store(grad_D + at.sequence * shape.channels + at.channel, sum_D, mask=at.inside)
    tl.store(grad_bias + at.sequence * shape.channels + at.channel, sum_bias, mask=at.inside)
    if grad_initial is not None:
        t = tl.arange(0, TILE)
        steps = _steps(_raw_steps(dt, parameters.dt_bias, at, t), at, t, SOFTPLUS)
        tl.store(grad_initial + at.sequence * size + plane, _row(_decays(steps, A), 0, TILE) * carry, mask=mask)


def launch_forward(call: Call, out: Tensor, final_state: Tensor, checkpoints: Tensor | None) -> Launch:
    """The forward kernel's launch; A, D, dt_bias and initial_state are contiguous float32."""
    arguments = (*_tokens_of(call), _parameters(call), call.initial_state, out, final_state, checkpoints, _shape(call))
    return Launch(_forward, _grid(call), (*arguments, *_constants(call)), warps=8)


def launch_backward(
    call: Call, checkpoints: Tensor, grad_out: Tensor, grad_state: Tensor | None, *grads: Any
) -> Launch:
    """The backward kernel's; `grads` are of x, dt, z, A, B, C, D, dt_bias and initial_state, the last or z may be None.

    Those of A, D and dt_bias have a row per sequence; those of B and C one per block of channels.
    """
    given = (checkpoints, _tokens(grad_out, call), grad_state, _shape(call))
    return Launch(
        _backward, _grid(call), (*_tokens_of(call), _parameters(call), *given, *grads, *_constants(call)), warps=8
    )


def forward(call: Call, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The op on a GPU."""
    _check(call)
    out, final_state, checkpoints = call.results(save)
    with on_device_of(call.x):
        launch_forward(_float32(call), out, final_state, checkpoints if save else None).run()
    return out, final_state, checkpoints


def backward(grad_out: Tensor, grad_state: Tensor | None, checkpoints: Tensor, call: Call) -> tuple[Tensor, ...]:
    """The op's derivative on a GPU."""
    x, dt, A, B, C, D, z, dt_bias, initial_state = grads = call.gradients()
    blocks, states, groups = _grid(call)[0], call.A.shape[1], call.B.shape[-2]
    of_A = checkpoints.new_empty(call.sequences, *call.A.shape)
    of_D, of_bias = checkpoints.new_empty(2, call.sequences, call.A.shape[0])
    of_B, of_C = checkpoints.new_empty(2, blocks, call.x.shape[:-1].numel(), states)
    of_initial = None if call.initial_state is None else torch.empty_like(of_A)
    given = (checkpoints, grad_out, None if grad_state is None else grad_state.contiguous())
    gate = None if call.z is None else z
    with on_device_of(call.x):
        launch_backward(_float32(call), *given, x, dt, gate, of_A, of_B, of_C, of_D, of_bias, of_initial).run()
    for to, parameter, rows in ((A, call.A, of_A), (D, call.D, of_D), (dt_bias, call.dt_bias, of_bias)):
        if parameter is not None:
            to.copy_(rows.sum(0))
    for to, partial in ((B, of_B), (C, of_C)):
        to.copy_(partial.view(groups, blocks // groups, -1, states).sum(1).transpose(0, 1).reshape(to.shape))
    if of_initial is not None:
        initial_state.copy_(of_initial)
    return grads


def step(
    x: Tensor,
    state: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """A step's output on a GPU; `state` is updated in place."""
    gate = None if z is None else z[:, None]
    call = Call(x[:, None], dt[:, None], A, B[:, None], C[:, None], D, gate, dt_bias, state, None, dt_softplus)
    out, new, _ = forward(call, False)
    state.copy_(new)
    return out[:, 0]


def _check(call: Call) -> None:
    """The boundaries' values, where they can be read."""
    if call.cu_seqlens is not None and not (call.x.is_cuda and torch.cuda.is_current_stream_capturing()):
        boundaries(call.cu_seqlens, call.x.shape[0])


def _float32(call: Call) -> Call:
    D, dt_bias, state = (None if u is None else _wide(u) for u in (call.D, call.dt_bias, call.initial_state))
    return call._replace(A=_wide(call.A), D=D, dt_bias=dt_bias, initial_state=state)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _parameters(call: Call) -> Parameters:
    return Parameters(call.A, call.D, call.dt_bias)


def _tokens(x: Tensor | None, call: Call) -> Tokens:
    if x is None:
        return Tokens(None, 0, 0, 0)
    return Tokens(x, *x.stride()) if call.cu_seqlens is None else Tokens(x, 0, *x.stride())


def _tokens_of(call: Call) -> tuple[Any, ...]:
    groups = [Groups(u, *(u.stride() if call.cu_seqlens is None else (0, *u.stride()))) for u in (call.B, call.C)]
    return _tokens(call.x, call), _tokens(call.dt, call), _tokens(call.z, call), *groups


def _shape(call: Call) -> Shape:
    channels, states = call.A.shape
    tokens = call.x.shape[:-1].numel()
    return Shape(call.cu_seqlens, call.x.shape[-2], tokens, channels, states, channels // call.B.shape[-2])


def _sizes(call: Call) -> tuple[int, int]:
    """How many channels and states a program takes: powers of two, which may be more than there are."""
    states, group = triton.next_power_of_2(call.A.shape[1]), call.A.shape[0] // call.B.shape[-2]
    return min(max(_PLANE // states, 1), triton.next_power_of_2(group)), states


def _grid(call: Call) -> tuple[int, int]:
    groups = call.B.shape[-2]
    return groups * triton.cdiv(call.A.shape[0] // groups, _sizes(call)[0]), call.sequences


def _constants(call: Call) -> tuple[Any, ...]:
    return call.dt_softplus, *_sizes(call), _TILE, CHUNK
