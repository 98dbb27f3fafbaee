"""What the steps of decoding share: the short way to their native kernels, and who must take the long one.

A model makes dozens of these calls for a token, and what they compute takes microseconds. The short way is one native
call, which checks that everything fits and computes, or does nothing and returns False. The long way then says what did
not fit, or serves what the short one leaves out: other devices, other types, tensors that are more than their memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from onchip.ops import _native
from onchip.ops._library import needs_grad

kernels: Any = _native.kernels
_there = _native.missing is None and kernels.read_tensors_of(Tensor, torch.nn.Parameter)


def direct(backend: str | None, *tensors: Tensor | None) -> bool:
    """Whether a step may go the short way: nothing traces, transforms or differentiates it, and no mode watches.

    The first two, such as x_t and the state, are then plain tensors.
    """
    return (
        _there
        and (backend is None or backend == "cpu")
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and type(tensors[0]) is type(tensors[1]) is Tensor
        and not differentiated(*tensors)
        and torch._C._len_torch_dispatch_stack() == 0
    )


def in_place_of_pytorchs(x: Tensor, *more: Tensor | None) -> bool:
    """Whether the short way may stand in for a function of PyTorch's, which autocast and modes may change, too."""
    return (
        direct(None, x, x, *more) and not torch.is_autocast_enabled("cpu") and torch._C._len_torch_function_stack() == 0
    )


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether a gradient is wanted, backward or forward, which the reference gives."""
    backward = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)
    return backward or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def check_writable(out_state: Tensor | None, *tensors: Tensor | None) -> None:
    """A step of these tensors may write its state there.

    Raises:
        ValueError: it is differentiated, or entries of `out_state` are one in memory.
    """
    if out_state is None:
        return
    if needs_grad((out_state, *tensors)):
        raise ValueError("out_state must be None where a gradient is asked for: what it held would be lost")
    if any(stride == 0 and size > 1 for stride, size in zip(out_state.stride(), out_state.shape, strict=True)):
        raise ValueError(
            "out_state must have memory for each of its entries, got one that is expanded, of strides "
            f"{out_state.stride()}"
        )


def changed(tensor: Tensor) -> None:
    """Autograd takes note that a kernel has written into the tensor."""
    torch.autograd.graph.increment_version(tensor)
