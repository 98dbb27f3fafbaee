"""The one library in which PyTorch's dispatcher finds onchip's ops, as `torch.ops.onchip`."""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch.autograd import forward_ad

library = torch.library.Library("onchip", "DEF")  # type: ignore[no-untyped-call]


def in_torch_func_grad() -> bool:
    """Whether torch.func differentiates the call: it serves an autograd.Function above the dispatcher only."""
    transform = peek_interpreter_stack()
    return transform is not None and transform.key() in (TransformType.Grad, TransformType.Jvp)


def needs_grad(args: tuple[Any, ...]) -> bool:
    """Backward or forward: a tangent that came in unnoticed would be dropped in silence."""
    backward = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
    return backward or forward_ad._current_level >= 0


def differentiated_once(name: str, backward_op: Any) -> Any:
    """The op of `name`'s backward pass as a function that keeps a second derivative from being dropped in silence."""

    def refuse(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{name}: the fused kernels have no second derivative; call with backend='reference' to differentiate twice"
        )

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return backward_op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pass

        backward = jvp = staticmethod(refuse)

    return Backward
