"""The causal convolution on the native CPU kernels (native/causal_conv1d), forward and backward.

The kernels take any strides and any width. Lanes of a vector are channels, or times where x is contiguous along time,
as in a transposed `(B, D, T)`. Inputs and outputs cross once, in their place: only the first of a sequence, behind its
state, and inputs whose lanes lie apart are copied.
"""

import torch
from torch import Tensor

from onchip.ops import _native
from onchip.ops._native import Described, describe
from onchip.ops._sequence import boundaries
from onchip.ops.causal_conv1d.outputs import in_layout_of, output_like, state_like, time_contiguous


def limits(x: Tensor) -> str | None:
    """Why the native kernels cannot serve this call, or None."""
    return _native.missing


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> Tensor:
    """The op on the CPU, without its final state."""
    out = output_like(x)
    starts = [] if cu_seqlens is None else boundaries(cu_seqlens, x.shape[0])
    sizes = _sizes(x, weight, starts, silu)
    _native.kernels.causal_conv1d_forward(sizes, starts, _tensors(x, weight, bias, initial_state, out))
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
    """Its derivative on the CPU: the gradients of x, weight, bias and initial_state."""
    starts = [] if cu_seqlens is None else boundaries(cu_seqlens, x.shape[0])
    sizes, tensors = _sizes(x, weight, starts, silu), _tensors(x, weight, bias, initial_state, None)
    grad_out, grad_x, grad_weight = in_layout_of(x, grad_out), output_like(x), weight.new_empty(weight.shape)
    grad_bias = None if bias is None else bias.new_empty(bias.shape)
    grad_state = None if initial_state is None else state_like(x, weight.shape[1], cu_seqlens)
    gradients = _tensors(grad_x, grad_weight, grad_bias, grad_state, None)
    described = (describe(grad_out, packed=x.ndim == 2), *gradients[:4])
    _native.kernels.causal_conv1d_backward(sizes, starts, tensors, described)
    return grad_x, grad_weight, grad_bias, grad_state


def step(x_t: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """A step's output; `state`, of at least W - 1 rows, is moved on in place."""
    out, x = x_t.new_empty(x_t.shape), x_t[:, None]
    sizes = (x.shape[0], 1, *weight.shape, silu, False, torch.get_num_threads())
    _native.kernels.causal_conv1d_step(
        sizes, _tensors(x, weight, bias, None, out[:, None]), describe(state), state.shape[1]
    )
    return out


def _sizes(x: Tensor, weight: Tensor, starts: list[int], silu: bool) -> tuple[int, ...]:
    batch, length = (len(starts) - 1, 0) if starts else x.shape[:2]
    return (batch, length, *weight.shape, silu, time_contiguous(x), torch.get_num_threads())


def _tensors(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, out: Tensor | None
) -> tuple[Described | None, ...]:
    packed = x.ndim == 2
    return (
        describe(x, packed=packed),
        describe(weight),
        None if bias is None else describe(bias),
        None if state is None else describe(state),
        None if out is None else describe(out, packed=packed),
    )
