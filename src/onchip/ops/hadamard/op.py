"""The Walsh–Hadamard transform's registration with PyTorch's dispatcher: schema, kernels, fake kernel, derivatives.

The op is y = scale · ((x ∘ before) H) ∘ after, with either vector optional. As H is symmetric, its derivative with
respect to x is the op itself with the two vectors exchanged: one kernel serves, differentiated any number of times.
"""

from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from onchip.ops._library import in_torch_func_grad, library
from onchip.ops.hadamard import cpu

library.define(  # type: ignore[no-untyped-call]
    "hadamard(Tensor x, Tensor? before, Tensor? after, float scale, str? backend=None) -> Tensor"
)

_hadamard = torch.ops.onchip.hadamard.default


def hadamard(x: Tensor, before: Tensor | None, after: Tensor | None, scale: float, backend: str | None) -> Tensor:
    """Call the op; torch.func differentiates an autograd.Function only where it is above the dispatcher."""
    if not torch.compiler.is_compiling() and in_torch_func_grad():
        return cast(Tensor, _Hadamard.apply(x, before, after, scale, backend))  # type: ignore[no-untyped-call]
    return cast(Tensor, _hadamard(x, before, after, scale, backend))


def _kernel(x: Tensor, before: Tensor | None, after: Tensor | None, scale: float, backend: str | None = None) -> Tensor:
    in_triton = x.is_cuda or backend == "triton"
    # Imported late: it brings Triton, for which `import onchip` should not wait.
    implementation = import_module("onchip.ops.hadamard.triton") if in_triton else cpu
    return cast(Tensor, implementation.transform(x, before, after, scale))


for _device in ("CPU", "CUDA"):
    library.impl("hadamard", _kernel, _device)  # type: ignore[no-untyped-call]


@torch.library.register_fake("onchip::hadamard", lib=library)  # type: ignore[untyped-decorator]
def _(x: Tensor, before: Tensor | None, after: Tensor | None, scale: float, backend: str | None = None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_vmap("onchip::hadamard", lib=library)  # type: ignore[untyped-decorator]
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    before: Tensor | None,
    after: Tensor | None,
    scale: float,
    backend: str | None = None,
) -> tuple[Tensor, int]:
    x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    if in_dims[1] is None and in_dims[2] is None:
        return hadamard(x, before, after, scale, backend), 0
    # A vector of factors per element of the batch: they go around the op, still with one rounding at the end.
    shape = (info.batch_size, *(1,) * (x.ndim - 2), x.shape[-1])
    first, last = (
        None if f is None else _wide(f, x) if dim is None else _wide(f, x).movedim(dim, 0).reshape(shape)
        for f, dim in zip((before, after), in_dims[1:3], strict=True)
    )
    y = hadamard(_wide(x, x) if first is None else _wide(x, x) * first, None, None, scale, backend)
    return (y if last is None else y * last).to(x.dtype), 0


class _Hadamard(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _hadamard(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.scale, ctx.backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        x, before, after = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * 5
        if ctx.needs_input_grad[0]:
            grads[0] = hadamard(grad, after, before, ctx.scale, ctx.backend)
        if ctx.needs_input_grad[1]:
            grads[1] = _factor_gradient(x, hadamard(_wide(grad, x), after, None, ctx.scale, ctx.backend), before)
        if ctx.needs_input_grad[2]:
            grads[2] = _factor_gradient(grad, hadamard(_wide(x, x), before, None, ctx.scale, ctx.backend), after)
        return tuple(grads)

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, before_t: Tensor | None, after_t: Tensor | None, *_: None) -> Tensor:
        x, before, after = ctx.saved_tensors
        terms = []  # the op is linear in each of the three
        if x_t is not None:
            terms.append(hadamard(x_t, before, after, ctx.scale, ctx.backend))
        if before_t is not None:
            terms.append(hadamard(x, before_t, after, ctx.scale, ctx.backend))
        if after_t is not None:
            terms.append(hadamard(x, before, after_t, ctx.scale, ctx.backend))
        return sum(terms[1:], terms[0])


def _factor_gradient(rows: Tensor, transformed: Tensor, factor: Tensor) -> Tensor:
    """The sum over all rows, in the type of the arithmetic."""
    product = _wide(rows, rows) * transformed
    return product.reshape(-1, product.shape[-1]).sum(0).to(factor.dtype)


def _wide(x: Tensor, like: Tensor) -> Tensor:
    """`x` in the type of the arithmetic on `like`."""
    return x.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


@torch.library.impl(library, "hadamard", "Autograd")
def _(x: Tensor, before: Tensor | None, after: Tensor | None, scale: float, backend: str | None = None) -> Any:
    requires_grad = torch.is_grad_enabled() and any(f is not None and f.requires_grad for f in (x, before, after))
    if requires_grad or forward_ad._current_level >= 0:  # a tangent that came in unnoticed would be dropped in silence
        return _Hadamard.apply(x, before, after, scale, backend)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return _hadamard(x, before, after, scale, backend)
