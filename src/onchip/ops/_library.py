"""The one library in which PyTorch's dispatcher finds onchip's ops, as `torch.ops.onchip`."""

from collections.abc import Callable, Sequence
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


def differentiated_by(function: type[torch.autograd.Function], name: str) -> Callable[..., Any]:
    """Make `function`, which takes the arguments of the op of that name, its autograd; a call of the op."""
    op = getattr(torch.ops.onchip, name).default

    def kernel(*args: Any) -> Any:
        if needs_grad(args):
            return function.apply(*args)  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def call(*args: Any) -> Any:
        above_the_dispatcher = not torch.compiler.is_compiling() and in_torch_func_grad()
        return function.apply(*args) if above_the_dispatcher else op(*args)  # type: ignore[no-untyped-call]

    library.impl(name, kernel, "Autograd")  # type: ignore[no-untyped-call]
    return call


def backward_once(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """A call of `name`'s backward op that keeps a second derivative from being dropped in silence."""
    op = getattr(torch.ops.onchip, f"{name}_backward").default

    def refuse(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{name}: the fused kernels have no second derivative; onchip.{name}(…, backend='reference') has one"
        )

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pass

        backward = jvp = staticmethod(refuse)

    return differentiated_by(Backward, f"{name}_backward")


def no_forward_mode(name: str) -> Any:
    """The `jvp` of an autograd.Function whose kernels go backward alone."""

    def refuse(ctx: Any, *tangents: Tensor | None) -> Any:
        raise RuntimeError(
            f"{name}: the fused kernels have no forward-mode derivative; onchip.{name}(…, backend='reference') has one"
        )

    return staticmethod(refuse)


def asked_for(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of the first arguments, with None for those that nobody wants and for the other arguments."""
    kept = [grad if wanted else None for grad, wanted in zip(grads, ctx.needs_input_grad, strict=False)]
    return (*kept, *(None,) * (len(ctx.needs_input_grad) - len(kept)))
