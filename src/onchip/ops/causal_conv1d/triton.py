"""The causal convolution in Triton, forward and backward, and a step in place.

A program computes a tile of times and channels. Inputs that several taps see come from the cache, and the backward pass
computes anew what it needs of the activation's input: memory is read once and written once. Sums over time are left by
each program in its own place and added in one order, without atomics.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from onchip.ops._sequence import boundaries
from onchip.ops._triton import Launch, on_device_of
from onchip.ops.causal_conv1d.outputs import in_layout_of, output_like, state_like, time_contiguous

_ALONG, _ACROSS = 128, 16  # a tile's size in the dimension in which memory is contiguous, and in the other
_TILES = 16  # that a program of the backward pass sums over
_CHANNELS = 256  # of a step


class Call(NamedTuple):
    """A call as the kernels see it: addresses, of which some may be None, strides and sizes.

    With packed sequences `sequence` holds each row's number, and `starts` the boundaries.
    """

    x: Any
    weight: Any
    bias: Any
    state: Any
    sequence: Any
    starts: Any
    x_batch: int
    x_time: int
    x_channel: int
    weight_channel: int
    weight_tap: int
    bias_channel: int
    state_sequence: int
    state_row: int
    state_channel: int
    length: int
    channels: int


class Rows(NamedTuple):
    """`(batch, time, channel)` to read or write."""

    ptr: Any
    batch: int
    time: int
    channel: int


def _rows(x: Tensor) -> Rows:
    return Rows(x, *((0, *x.stride()) if x.ndim == 2 else x.stride()))


@triton.jit
def _bounds(call, b, t):
    """Of which sequence the rows at times t are, and where it starts and ends."""
    if call.sequence is not None:
        s = tl.load(call.sequence + t, mask=t < call.length, other=0).to(tl.int64)
        start, end = tl.load(call.starts + s).to(tl.int64), tl.load(call.starts + s + 1).to(tl.int64)
    else:
        s = tl.zeros_like(t) + b
        start, end = tl.zeros_like(t), tl.zeros_like(t) + call.length
    return s, start, end


@triton.jit
def _sigmoid(y):
    """Its exponential is only taken of what is not positive."""
    e = tl.exp(-tl.abs(y))
    return tl.where(y < 0, e, 1.0) / (1 + e)


@triton.jit
def _tap(call, w, c):
    return tl.load(call.weight + c * call.weight_channel + w * call.weight_tap, mask=c < call.channels, other=0).to(
        tl.float32
    )


@triton.jit
def _input(call, b, s, start, t, c, seen, WIDTH: tl.constexpr):
    """The inputs at times t, those before the start from the state; zero where they are not `seen`."""
    inside = t >= start
    at = call.x + b * call.x_batch + t * call.x_time + c * call.x_channel
    x = tl.load(at, mask=seen & inside, other=0).to(tl.float32)
    if call.state is not None:
        row = t - start + WIDTH - 1
        at = call.state + s * call.state_sequence + row * call.state_row + c * call.state_channel
        x += tl.load(at, mask=seen & (t < start), other=0).to(tl.float32)
    return x


@triton.jit
def _convolved(call, b, s, start, t, c, seen, WIDTH: tl.constexpr):
    """What goes into the activation at times t."""
    y = tl.zeros_like(t).to(tl.float32) + tl.zeros_like(c).to(tl.float32)
    if call.bias is not None:
        y += tl.load(call.bias + c * call.bias_channel, mask=c < call.channels, other=0).to(tl.float32)
    for w in range(WIDTH):
        y += _tap(call, w, c) * _input(call, b, s, start, t - (WIDTH - 1 - w), c, seen, WIDTH)
    return y


@triton.jit
def _gradient(call, grad, b, s, start, t, c, seen, WIDTH: tl.constexpr, SILU: tl.constexpr):
    """The gradient of what goes into the activation at times t; zero where it is not `seen`."""
    at = grad.ptr + b * grad.batch + t * grad.time + c * grad.channel
    g = tl.load(at, mask=seen, other=0).to(tl.float32)
    if SILU:
        y = _convolved(call, b, s, start, t, c, seen, WIDTH)
        slope = _sigmoid(y)
        g *= slope * (1 + y * (1 - slope))
    return g


@triton.jit
def _from_later(call, grad, b, s, start, end, t, c, seen, WIDTH: tl.constexpr, SILU: tl.constexpr):
    """The gradient of the inputs at times t through the outputs after them."""
    sum = tl.zeros_like(t).to(tl.float32) + tl.zeros_like(c).to(tl.float32)
    for k in range(1, WIDTH):
        there = seen & (t + k >= start) & (t + k < end)
        sum += _tap(call, WIDTH - 1 - k, c) * _gradient(call, grad, b, s, start, t + k, c, there, WIDTH, SILU)
    return sum


@triton.jit
def _tile(number, times, blocks, CHANNELS: tl.constexpr):
    """Of a program: its batch, its number in time, and its channels."""
    c = (number % blocks).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return (number // blocks // times).to(tl.int64), (number // blocks % times).to(tl.int64), c


@triton.jit
def _convolve(
    call, out, times, blocks, WIDTH: tl.constexpr, SILU: tl.constexpr, TIMES: tl.constexpr, CHANNELS: tl.constexpr
):
    b, block, c = _tile(tl.program_id(0), times, blocks, CHANNELS)
    t = block * TIMES + tl.arange(0, TIMES)[:, None]
    s, start, _end = _bounds(call, b, t)
    seen = (t < call.length) & (c < call.channels)
    y = _convolved(call, b, s, start, t, c, seen, WIDTH)
    if SILU:
        y *= _sigmoid(y)
    at = out.ptr + b * out.batch + t * out.time + c * out.channel
    tl.store(at, y.to(out.ptr.dtype.element_ty), mask=seen)


@triton.jit
def _differentiate(
    call,
    grad,
    grad_x,
    sums,
    times,
    blocks,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    TIMES: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
):
    """`sums` is (programs along batch and time, WIDTH + 1, channels): of each tap, and of the bias after them."""
    b, block, c = _tile(tl.program_id(0), times, blocks, CHANNELS)
    tap = tl.arange(0, TAPS)[:, None]
    total = tl.zeros([TAPS, CHANNELS], tl.float32)
    for tile in range(tl.minimum(TILES, tl.cdiv(call.length - block * TILES * TIMES, TIMES))):
        t = (block * TILES + tile) * TIMES + tl.arange(0, TIMES)[:, None]
        s, start, end = _bounds(call, b, t)
        seen = (t < call.length) & (c < call.channels)
        g = _gradient(call, grad, b, s, start, t, c, seen, WIDTH, SILU)
        to_x = _tap(call, WIDTH - 1, c) * g
        to_x += _from_later(call, grad, b, s, start, end, t, c, seen, WIDTH, SILU)
        at = grad_x.ptr + b * grad_x.batch + t * grad_x.time + c * grad_x.channel
        tl.store(at, to_x.to(grad_x.ptr.dtype.element_ty), mask=seen)
        for w in range(WIDTH):
            product = g * _input(call, b, s, start, t - (WIDTH - 1 - w), c, seen, WIDTH)
            total += tl.where(tap == w, tl.sum(product, 0)[None, :], 0.0)
        total += tl.where(tap == WIDTH, tl.sum(g, 0)[None, :], 0.0)
    at = sums + ((b * times + block) * (WIDTH + 1) + tap) * call.channels + c
    tl.store(at, total, mask=(tap <= WIDTH) & (c < call.channels))


@triton.jit
def _differentiate_state(
    call, grad, grad_state, blocks, WIDTH: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """A program for each sequence and block of channels; `grad_state` is (sequences, WIDTH - 1, channels)."""
    number, _, c = _tile(tl.program_id(0), 1, blocks, CHANNELS)
    b = number
    s, start, end = number, tl.zeros_like(number), tl.zeros_like(number) + call.length
    if call.starts is not None:
        b = tl.zeros_like(number)
        start, end = tl.load(call.starts + s).to(tl.int64), tl.load(call.starts + s + 1).to(tl.int64)
    row = tl.arange(0, ROWS)[:, None]
    seen = (row < WIDTH - 1) & (c < call.channels)
    to_state = _from_later(call, grad, b, s, start, end, start + row - (WIDTH - 1), c, seen, WIDTH, SILU)
    at = grad_state + (s * (WIDTH - 1) + row) * call.channels + c
    tl.store(at, to_state.to(grad_state.dtype.element_ty), mask=seen)


@triton.jit
def _step(call, x, out, rows, WIDTH: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr):
    """The state has `rows`, of which the filter sees the last; each channel is one thread's."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    seen = c < call.channels
    present = tl.load(x.ptr + b * x.batch + c * x.channel, mask=seen, other=0)
    state = call.state + b * call.state_sequence + c * call.state_channel
    y = _tap(call, WIDTH - 1, c) * present.to(tl.float32)
    if call.bias is not None:
        y += tl.load(call.bias + c * call.bias_channel, mask=seen, other=0).to(tl.float32)
    for w in range(WIDTH - 1):
        row = rows - (WIDTH - 1) + w
        y += _tap(call, w, c) * tl.load(state + row * call.state_row, mask=seen, other=0).to(tl.float32)
    for row in range(rows - 1):
        tl.store(state + row * call.state_row, tl.load(state + (row + 1) * call.state_row, mask=seen), mask=seen)
    if rows > 0:
        tl.store(state + (rows - 1) * call.state_row, present, mask=seen)
    if SILU:
        y *= _sigmoid(y)
    tl.store(out.ptr + b * out.batch + c * out.channel, y.to(out.ptr.dtype.element_ty), mask=seen)


def describe(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Call, int]:
    """The call, and how many batches it has. Which sequence a row is of is found on the device."""
    length, sequence = x.shape[-2], None
    if cu_seqlens is not None:
        rows = torch.arange(length, device=x.device, dtype=cu_seqlens.dtype)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True, out_int32=True)
        cu_seqlens = cu_seqlens.contiguous()
    x_rows = _rows(x)
    state_strides: tuple[int, ...] = (0, 0, 0) if state is None else state.stride()
    bias_stride = 0 if bias is None else bias.stride(0)
    strides = [x_rows.batch, x_rows.time, x_rows.channel, *weight.stride(), bias_stride, *state_strides]
    fields: list[Any] = [x, weight, bias, state, sequence, cu_seqlens, *strides, length, x.shape[-1]]
    return Call(*fields), 1 if x.ndim == 2 else x.shape[0]


def _shape(x: Tensor) -> tuple[int, int]:
    """Times and channels of a tile."""
    return (_ALONG, _ACROSS) if time_contiguous(x) else (_ACROSS, _ALONG)


def convolve(described: tuple[Call, int], width: int, silu: bool, out: Tensor) -> Launch:
    """The launch of the forward pass."""
    (call, batch), (times, channels) = described, _shape(out)
    in_time, blocks = triton.cdiv(call.length, times), triton.cdiv(call.channels, channels)
    arguments = (call, _rows(out), in_time, blocks, width, silu, times, channels)
    return Launch(_convolve, (batch * in_time * blocks,), arguments)


def programs_in_time(described: tuple[Call, int], x: Tensor) -> int:
    """Of the backward pass, over all batches."""
    call, batch = described
    in_time: int = triton.cdiv(call.length, _shape(x)[0] * _TILES)
    return batch * in_time


def differentiate(
    described: tuple[Call, int], width: int, silu: bool, grad_out: Tensor, grad_x: Tensor, sums: Tensor
) -> Launch:
    """The launch of the backward pass, but for the state."""
    (call, _), (times, channels) = described, _shape(grad_x)
    in_time, blocks = triton.cdiv(call.length, times * _TILES), triton.cdiv(call.channels, channels)
    taps = triton.next_power_of_2(width + 1)
    sizes = (width, taps, silu, times, channels, _TILES)
    arguments = (call, _rows(grad_out), _rows(grad_x), sums, in_time, blocks, *sizes)
    return Launch(_differentiate, (sums.shape[0] * blocks,), arguments)


def differentiate_state(
    described: tuple[Call, int], width: int, silu: bool, grad_out: Tensor, grad_state: Tensor
) -> Launch:
    """The launch of the state's gradient."""
    call, _ = described
    rows = triton.next_power_of_2(max(width - 1, 1))
    channels = max(_ALONG // rows, 16)
    blocks = triton.cdiv(call.channels, channels)
    grid = (grad_state.shape[0] * blocks if width > 1 else 0,)
    return Launch(_differentiate_state, grid, (call, _rows(grad_out), grad_state, blocks, width, silu, rows, channels))


def _check_boundaries(cu_seqlens: Tensor | None, x: Tensor) -> None:
    if cu_seqlens is not None and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        boundaries(cu_seqlens, x.shape[0])


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> Tensor:
    """The op on a GPU, without its final state."""
    _check_boundaries(cu_seqlens, x)
    out = output_like(x)
    with on_device_of(x):
        convolve(describe(x, weight, bias, initial_state, cu_seqlens), weight.shape[1], silu, out).run()
    return out


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Its derivative on a GPU: the gradients of x, weight, bias and initial_state."""
    _check_boundaries(cu_seqlens, x)
    width = weight.shape[1]
    grad_out, grad_x = in_layout_of(x, grad_out), output_like(x)
    grad_state = None if initial_state is None else state_like(x, width, cu_seqlens)
    with on_device_of(x):
        call = describe(x, weight, bias, initial_state, cu_seqlens)
        sums = x.new_empty((programs_in_time(call, x), width + 1, x.shape[-1]), dtype=torch.float32)
        differentiate(call, width, silu, grad_out, grad_x, sums).run()
        if grad_state is not None:
            differentiate_state(call, width, silu, grad_out, grad_state).run()
    total = sums.sum(0)
    grad_weight = weight.new_empty(weight.shape).copy_(total[:width].t())
    return grad_x, grad_weight, None if bias is None else total[width].to(bias.dtype), grad_state


def step(x_t: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """A step's output; `state`, of at least W - 1 rows, is moved on in place."""
    out = x_t.new_empty(x_t.shape)
    with on_device_of(x_t):
        move_on(x_t, state, weight, bias, silu, out).run()
    return out


def move_on(x_t: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, out: Tensor) -> Launch:
    """The launch of a step."""
    call, batch = describe(x_t[:, None], weight, bias, state, None)
    present, result = _rows(x_t[:, None]), _rows(out[:, None])
    grid = (batch, triton.cdiv(call.channels, _CHANNELS))
    return Launch(_step, grid, (call, present, result, state.shape[1], weight.shape[1], silu, _CHANNELS))
