"""ssd on the native CPU kernels (native/ssd): the op's CPU implementation, forward, backward and step.

The kernels take any strides, sizes and dtypes, and widen 16-bit inputs as they read them. A thread takes some heads of
a group from the first chunk of time to the last: the products of a chunk and the states stay in cache.
"""

import torch
from torch import Tensor

from onchip.ops import _native
from onchip.ops._sequence import boundaries
from onchip.ops.ssd.call import Call

CHUNK = 64
MAX_CHUNK = 256  # beyond, a chunk would not fit the second-level cache


def limits(*tensors: Tensor) -> str | None:
    """Why the native kernels cannot serve this call, or None."""
    return _native.missing


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """The op on the CPU."""
    out, state = call.results()
    sizes, limit, starts, tensors = _describe(call, out, state)
    _native.kernels.ssd_forward(sizes, limit, starts, tensors)
    return out, state


def backward(grad_out: Tensor, grad_state: Tensor | None, call: Call) -> tuple[Tensor, ...]:
    """Its derivative on the CPU."""
    sizes, limit, starts, tensors = _describe(call, None, None)
    packed = call.cu_seqlens is not None
    grads = call.gradients()
    grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_dt_bias, grad_initial = grads
    states, heads, dim, _ = call.states
    sums = torch.zeros(states, heads, dim + 2, dtype=torch.float64)  # D's, A's and dt_bias's
    grad_state = None if grad_state is None else grad_state.to(call.dtype)
    gradients = (
        _native.describe(grad_out, packed=packed),
        None if grad_state is None else _native.describe(grad_state),
        _native.describe(grad_x, packed=packed),
        _native.describe(grad_dt, packed=packed),
        _native.describe(grad_B, packed=packed),
        _native.describe(grad_C, packed=packed),
        None if call.z is None else _native.describe(grad_z, packed=packed),
        None if call.initial_state is None else _native.describe(grad_initial),
        _native.describe(sums[..., dim]),
        None if call.D is None else _native.describe(sums),
        _native.describe(sums[..., dim + 1]),
    )
    _native.kernels.ssd_backward(sizes, limit, starts, tensors, gradients)
    total = sums.sum(0)
    grad_A.copy_(total[:, dim])
    if call.dt_bias is not None:
        grad_dt_bias.copy_(total[:, dim + 1])
    if call.D is not None:
        grad_D.copy_(total[:, :dim] if call.D.ndim == 2 else total[:, :dim].sum(1))
    return grads


def step(
    x_t: Tensor,
    state: Tensor,
    dt_t: Tensor,
    A: Tensor,
    B_t: Tensor,
    C_t: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_low: float,
    dt_high: float,
    out_state: Tensor,
) -> Tensor:
    """The step on the CPU; the new state is written into `out_state`, which may be `state`."""
    y = torch.empty_like(x_t, memory_format=torch.contiguous_format)
    tensors = (
        _at_a_time(x_t),
        _at_a_time(dt_t),
        _native.describe(A),
        _at_a_time(B_t),
        _at_a_time(C_t),
        None if D is None else _native.describe(D),
        None if z is None else _at_a_time(z),
        None if dt_bias is None else _native.describe(dt_bias),
        _native.describe(state),
        _at_a_time(y),
        _native.describe(out_state),
    )
    batch, heads, dim = x_t.shape
    groups, state_dim = B_t.shape[1:]
    sizes = (batch, 1, heads, groups, dim, state_dim, 1, dt_softplus, torch.get_num_threads())
    _native.kernels.ssd_step(sizes, (dt_low, dt_high), tensors)
    return y


def _describe(
    call: Call, out: Tensor | None, state: Tensor | None
) -> tuple[tuple[int, ...], tuple[float, float], list[int], tuple[_native.Described | None, ...]]:
    """The call as the kernels take it."""
    packed = call.cu_seqlens is not None
    starts = [] if call.cu_seqlens is None else boundaries(call.cu_seqlens, call.x.shape[0])
    tensors = (
        _native.describe(call.x, packed=packed),
        _native.describe(call.dt, packed=packed),
        _native.describe(call.A),
        _native.describe(call.B, packed=packed),
        _native.describe(call.C, packed=packed),
        None if call.D is None else _native.describe(call.D),
        None if call.z is None else _native.describe(call.z, packed=packed),
        None if call.dt_bias is None else _native.describe(call.dt_bias),
        None if call.initial_state is None else _native.describe(call.initial_state),
        None if out is None else _native.describe(out, packed=packed),
        None if state is None else _native.describe(state),
    )
    count, heads, dim, state_dim = call.states
    groups, time = call.B.shape[-2], call.x.shape[0 if packed else 1]
    chunk = min(call.chunk_size or CHUNK, MAX_CHUNK)
    sizes = (count, time, heads, groups, dim, state_dim, chunk, call.dt_softplus, torch.get_num_threads())
    return sizes, (call.dt_low, call.dt_high), starts, tensors


def _at_a_time(x: Tensor) -> _native.Described:
    """(B, …), as a sequence of one step."""
    return _native.describe(x.unsqueeze(1))
