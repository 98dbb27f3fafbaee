"""The selective scan on the native CPU kernels (native/selective_scan): the op's CPU implementation."""

import torch
from torch import Tensor

from onchip.ops import _native
from onchip.ops._sequence import boundaries
from onchip.ops.selective_scan.arguments import CHUNK, Call

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_Described = tuple[int, int, int, int, int, int]


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
    given = _per_token(grad_out, call), None if grad_state is None else _described(grad_state)
    gradients = (
        *given,
        _per_token(x, call),
        _per_token(dt, call),
        _described(per_sequence[0]),
        _described(B.flatten(0, -3)),
        _described(C.flatten(0, -3)),
        _described(per_sequence[1]),
        None if call.z is None else _per_token(z, call),
        _described(per_sequence[2]),
        None if call.initial_state is None else _described(initial_state),
        _described(partial[0]),
        _described(partial[1]),
    )
    _native.kernels.selective_scan_backward(sizes, starts, tensors, gradients)
    for grad, parameter, each in zip((A, D, dt_bias), (call.A, call.D, call.dt_bias), per_sequence, strict=True):
        if parameter is not None:
            grad.copy_(each.sum(0))
    return grads


def _problem(
    call: Call, out: Tensor | None, final_state: Tensor | None, checkpoints: Tensor | None
) -> tuple[tuple[int, ...], list[int], tuple[_Described | None, ...]]:
    """Sizes, the boundaries of packed sequences, and tensors, as the kernels take them."""
    rows = call.x.shape[:-1].numel()
    starts = [] if call.cu_seqlens is None else boundaries(call.cu_seqlens, rows)
    batch, time = call.x.shape[:2] if call.cu_seqlens is None else (1, rows)
    sizes = (batch, time, *call.A.shape, call.B.shape[-2], CHUNK, int(call.dt_softplus), torch.get_num_threads())
    tensors = (
        _per_token(call.x, call),
        _per_token(call.dt, call),
        _described(call.A),
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


def _described(x: Tensor, *before: int) -> _Described:
    strides = (*before, *x.stride(), 0, 0, 0)[:4]
    return (x.data_ptr(), _DTYPES[x.dtype], *strides)  # type: ignore[return-value]


def _optional(x: Tensor | None) -> _Described | None:
    return None if x is None else _described(x)


def _per_token(x: Tensor, call: Call) -> _Described:
    """A tensor `(batch, time, …)`, packed ones in a batch of one."""
    return _described(x) if call.cu_seqlens is None else _described(x, 0)
