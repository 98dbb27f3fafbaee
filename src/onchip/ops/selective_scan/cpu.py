"""The selective scan on the native CPU kernels (native/selective_scan): the op's CPU implementation."""

import torch
from torch import Tensor

from onchip.ops import _native
from onchip.ops._native import Described, describe
from onchip.ops._sequence import boundaries
from onchip.ops.selective_scan.arguments import CHUNK, Call


def limits(*tensors: Tensor) -> str | None:
    """Why the native kernels cannot serve this call, or None."""
    return _native.missing


def forward(call: Call, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The op on the CPU."""
    out, final_state, checkpoints = call.results(save)
    sizes, starts, tensors = _problem(call, out, final_state, checkpoints if save else None)
    _native.kernels.selective_scan_forward(sizes, starts, tensors)
    return out, final_state, checkpoints


def backward(grad_out: Tensor, grad_state: Tensor | None, checkpoints: Tensor, call: Call) -> tuple[Tensor, ...]:
    """The op's derivative on the CPU."""
    x, dt, A, B, C, D, z, dt_bias, initial_state = grads = call.gradients()
    channels, states = call.A.shape
    per_sequence = [
        checkpoints.new_empty(call.sequences, *shape) for shape in ((channels, states), (channels,), (channels,))
    ]
    blocks = _native.kernels.selective_scan_blocks(channels, call.B.shape[-2], call.wide == torch.float64)
    partial = checkpoints.new_empty(2, blocks, call.x.shape[:-1].numel(), states)
    sizes, starts, tensors = _problem(call, None, None, checkpoints)
    given = _per_token(grad_out, call), None if grad_state is None else describe(grad_state)
    gradients = (
        *given,
        _per_token(x, call),
        _per_token(dt, call),
        describe(per_sequence[0]),
        describe(B.flatten(0, -3)),
        describe(C.flatten(0, -3)),
        describe(per_sequence[1]),
        None if call.z is None else _per_token(z, call),
        describe(per_sequence[2]),
        None if call.initial_state is None else describe(initial_state),
        describe(partial[0]),
        describe(partial[1]),
    )
    _native.kernels.selective_scan_backward(sizes, starts, tensors, gradients)
    for grad, parameter, each in zip((A, D, dt_bias), (call.A, call.D, call.dt_bias), per_sequence, strict=True):
        if parameter is not None:
            grad.copy_(each.sum(0))
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
    """A step's output on the CPU; `state` is updated in place."""
    out = torch.empty_like(x)
    sizes = (x.shape[0], 1, *A.shape, B.shape[1], CHUNK, dt_softplus, torch.get_num_threads())
    optional = tuple(None if u is None else describe(u) for u in (D, z, dt_bias))
    given = (describe(x), describe(dt), describe(A), describe(B), describe(C), *optional)
    _native.kernels.selective_scan_step(sizes, (*given, None, describe(out), describe(state), None))
    return out


def _problem(
    call: Call, out: Tensor | None, final_state: Tensor | None, checkpoints: Tensor | None
) -> tuple[tuple[int, ...], list[int], tuple[Described | None, ...]]:
    """Sizes, the boundaries of packed sequences, and tensors, as the kernels take them."""
    rows = call.x.shape[:-1].numel()
    starts = [] if call.cu_seqlens is None else boundaries(call.cu_seqlens, rows)
    batch, time = call.x.shape[:2] if call.cu_seqlens is None else (1, rows)
    sizes = (batch, time, *call.A.shape, call.B.shape[-2], CHUNK, int(call.dt_softplus), torch.get_num_threads())
    tensors = (
        _per_token(call.x, call),
        _per_token(call.dt, call),
        describe(call.A),
        _per_token(call.B, call),
        _per_token(call.C, call),
        _optional(call.D),
        None if call.z is None else _per_token(call.z, call),
        _optional(call.dt_bias),
        _optional(call.initial_state),
        None if out is None else _per_token(out, call),
        _optional(final_state),
        _optional(checkpoints),
    )
    return sizes, starts, tensors


def _optional(x: Tensor | None) -> Described | None:
    return None if x is None else describe(x)


def _per_token(x: Tensor, call: Call) -> Described:
    """A tensor `(batch, time, …)`, packed ones in a batch of one."""
    return describe(x, packed=call.cu_seqlens is not None)
