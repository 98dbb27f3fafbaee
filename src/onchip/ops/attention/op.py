"""Attention's registration with PyTorch's dispatcher: schema, kernels, fake kernel, autograd.

The autograd kernel is our own rather than `torch.library.register_autograd`'s, which costs three times as much a call
(97 against 31 µs on the machine where this was decided).
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from onchip.ops._library import in_torch_func_grad, library, no_forward_mode
from onchip.ops.attention import cpu
from onchip.ops.attention.outputs import gradients_like, output_like

_OPTIONAL = (
    "Tensor? bias=None, Tensor? alibi_slopes=None, Tensor? sinks=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, float dropout_p=0.0, SymInt seed=0, "
    "str? backend=None, Tensor[]? block_mask=None, SymInt[]? mask_shape=None"
)
_DEFAULTS = (None, None, None, None, None, 0.0, 0, None, None, None)

library.define(  # type: ignore[no-untyped-call]
    "attention(Tensor q, Tensor k, Tensor v, int left, int right, float scale, float softcap, "
    f"{_OPTIONAL}, *, bool batch_invariant=False) -> (Tensor out, Tensor lse)"
)
library.define(  # type: ignore[no-untyped-call]
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, "
    f"int left, int right, float scale, float softcap, {_OPTIONAL}, "
    "*, bool bias_grad=False, bool slopes_grad=False, bool sinks_grad=False)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias, Tensor grad_slopes, Tensor grad_sinks)"
)

_attention = torch.ops.onchip.attention.default
_attention_backward = torch.ops.onchip.attention_backward.default
_ARGUMENTS = sum(not argument.kwarg_only for argument in _attention._schema.arguments)
_BACKEND = [argument.name for argument in _attention._schema.arguments].index("backend")


def attention(*args: Any, batch_invariant: bool) -> tuple[Tensor, Tensor]:
    """Call the op; arguments in the schema's order.

    Where nothing can require a gradient the autograd kernel is skipped: being Python, it would be a third of the price
    of a decode step's call. What is left out costs nothing.
    """
    asked = {"batch_invariant": True} if batch_invariant else {}
    if torch.compiler.is_compiling():
        return cast(tuple[Tensor, Tensor], _attention(*args, **asked))
    if torch._C._are_functorch_transforms_active():
        if in_torch_func_grad():
            return cast(tuple[Tensor, Tensor], _apply(asked, args))
        return cast(tuple[Tensor, Tensor], _attention(*args, **asked))
    if _needs_grad(args):
        return cast(tuple[Tensor, Tensor], _attention(*args, **asked))
    with torch._C._AutoDispatchBelowAutograd():
        return cast(tuple[Tensor, Tensor], _attention(*args, **asked))


def _kernel(name: str, at: int) -> Callable[..., Any]:
    """A kernel for every device: the implementation asked for by the argument `at`, or the device's own."""

    def kernel(*args: Any, **asked: bool) -> Any:
        backend = None
        if len(args) > at:
            backend, args = args[at], args[:at] + args[at + 1 :]
        in_triton = args[0].is_cuda or backend == "triton"
        # Imported late: it brings Triton, for which `import onchip` should not wait.
        implementation = import_module("onchip.ops.attention.triton") if in_triton else cpu
        return getattr(implementation, name)(*args, **asked)

    return kernel


for _device in ("CPU", "CUDA"):
    library.impl("attention", _kernel("forward", _BACKEND), _device)  # type: ignore[no-untyped-call]
    library.impl("attention_backward", _kernel("backward", 4 + _BACKEND), _device)  # type: ignore[no-untyped-call]


@torch.library.register_fake("onchip::attention", lib=library)  # type: ignore[untyped-decorator]
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    backend: str | None = None,
    block_mask: list[Tensor] | None = None,
    mask_shape: list[int] | None = None,
    *,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    return output_like(q, k, v, cu_seqlens_q)


@torch.library.register_fake("onchip::attention_backward", lib=library)  # type: ignore[untyped-decorator]
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    backend: str | None = None,
    block_mask: list[Tensor] | None = None,
    mask_shape: list[int] | None = None,
    *,
    bias_grad: bool = False,
    slopes_grad: bool = False,
    sinks_grad: bool = False,
) -> tuple[Tensor, ...]:
    return gradients_like(
        (q, k, v), bias if bias_grad else None, alibi_slopes if slopes_grad else None, sinks if sinks_grad else None
    )


def _needs_grad(args: tuple[Any, ...]) -> bool:
    """Backward or forward: a tangent that came in unnoticed would be dropped in silence."""
    return (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)) or forward_ad._current_level >= 0


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(asked: dict[str, bool], *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _attention(*args, **asked)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, q, k, v, left, right, scale, softcap, *optional, dropout_p, seed, backend, block_mask, mask_shape = inputs
        ctx.save_for_backward(*output, q, k, v, *optional, *(block_mask or ()))
        ctx.settings = (left, right, scale, softcap)
        ctx.more = (dropout_p, seed, backend)
        ctx.mask_shape = mask_shape
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, q, k, v, *optional = ctx.saved_tensors
        optional, block_mask = optional[:5], optional[5:] or None
        if grad_out is None and grad_lse is None:
            return (None,) * (1 + _ARGUMENTS)
        needs_bias, needs_slopes, needs_sinks = ctx.needs_input_grad[8:11]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        args = (grad_out, grad_lse, out, lse, q, k, v, *ctx.settings, *optional, *ctx.more, block_mask, ctx.mask_shape)
        asked = {"bias_grad": needs_bias, "slopes_grad": needs_slopes, "sinks_grad": needs_sinks}
        if not torch.compiler.is_compiling() and in_torch_func_grad():
            grads = _AttentionBackward.apply(asked, *args)  # type: ignore[no-untyped-call]
        else:
            grads = _attention_backward(*args, **asked)
        wanted = (*ctx.needs_input_grad[1:4], needs_bias, needs_slopes, needs_sinks)
        kept = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        return (None, *kept[:3], None, None, None, None, *kept[3:], *(None,) * 7)

    jvp = no_forward_mode("attention")


def _apply(asked: dict[str, bool], args: tuple[Any, ...]) -> Any:
    """Of the op's arguments, of which the last may be missing: callers and the dispatcher leave out what is default."""
    return _Attention.apply(asked, *args, *_DEFAULTS[len(args) - 7 :])  # type: ignore[no-untyped-call]


class _AttentionBackward(torch.autograd.Function):
    """Keeps a second derivative from being dropped in silence."""

    @staticmethod
    def forward(grads_asked: dict[str, bool], *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _attention_backward(*args, **grads_asked)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _no_second_derivative()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        _no_second_derivative()


def _no_second_derivative() -> None:
    raise RuntimeError(
        "attention: the fused kernels have no second derivative; onchip.attention(…, backend='reference') has one"
    )


@torch.library.impl(library, "attention", "Autograd")
def _attention_autograd(*args: Any, **asked: bool) -> Any:
    if _needs_grad(args):
        return _apply(asked, args)
    with torch._C._AutoDispatchBelowAutograd():
        return _attention(*args, **asked)


@torch.library.impl(library, "attention_backward", "Autograd")
def _attention_backward_autograd(*args: Any, **grads_asked: bool) -> Any:
    if _needs_grad(args):
        return _AttentionBackward.apply(grads_asked, *args)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return _attention_backward(*args, **grads_asked)
