"""The causal convolution's registration with PyTorch's dispatcher: schema, kernels, fake kernel, autograd."""

from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from onchip.ops._library import differentiated_once, in_torch_func_grad, library, needs_grad
from onchip.ops.causal_conv1d import cpu
from onchip.ops.causal_conv1d.outputs import add_through_final_state, final_state, output_like, state_like

_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu"
library.define(  # type: ignore[no-untyped-call]
    f"causal_conv1d({_ARGUMENTS}, bool return_final_state, str? backend) -> (Tensor out, Tensor final_state)"
)
library.define(  # type: ignore[no-untyped-call]
    f"causal_conv1d_backward(Tensor grad_out, Tensor? grad_final, {_ARGUMENTS}, str? backend)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_state)"
)

_causal_conv1d = torch.ops.onchip.causal_conv1d.default
_causal_conv1d_backward = torch.ops.onchip.causal_conv1d_backward.default


def causal_conv1d(*args: Any) -> tuple[Tensor, Tensor]:
    """Call the op; arguments in the schema's order. A state that is not asked for has no elements."""
    if not torch.compiler.is_compiling() and in_torch_func_grad():
        return cast(tuple[Tensor, Tensor], _CausalConv1d.apply(*args))  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor], _causal_conv1d(*args))


def implementation(x: Tensor, backend: str | None) -> Any:
    """The device's kernels, or those asked for."""
    # Imported late: it brings Triton, for which `import onchip` should not wait.
    return import_module("onchip.ops.causal_conv1d.triton") if x.is_cuda or backend == "triton" else cpu


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    return_final_state: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    out = implementation(x, backend).forward(x, weight, bias, initial_state, cu_seqlens, silu)
    if not return_final_state:
        return out, x.new_empty(0)
    return out, final_state(x, initial_state, weight.shape[1], cu_seqlens)


def _backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    backend: str | None,
) -> tuple[Tensor, ...]:
    grads = implementation(x, backend).backward(grad_out, x, weight, bias, initial_state, cu_seqlens, silu)
    if grad_final is not None:
        add_through_final_state(grad_final, grads[0], grads[3], cu_seqlens)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


for _device in ("CPU", "CUDA"):
    library.impl("causal_conv1d", _forward, _device)  # type: ignore[no-untyped-call]
    library.impl("causal_conv1d_backward", _backward, _device)  # type: ignore[no-untyped-call]


@torch.library.register_fake("onchip::causal_conv1d", lib=library)  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    return_final_state: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    state = state_like(x, weight.shape[1], cu_seqlens) if return_final_state else x.new_empty(0)
    return output_like(x), state


@torch.library.register_fake("onchip::causal_conv1d_backward", lib=library)  # type: ignore[untyped-decorator]
def _(
    grad_out: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    backend: str | None,
) -> tuple[Tensor, ...]:
    grad_bias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    grad_state = x.new_empty(0) if initial_state is None else state_like(x, weight.shape[1], cu_seqlens)
    return output_like(x), weight.new_empty(weight.shape), grad_bias, grad_state


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _causal_conv1d(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.silu, ctx.return_final_state, ctx.backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        if not ctx.return_final_state:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_final is None:
            return (None,) * 8
        x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
        grad_out = torch.zeros_like(x) if grad_out is None else grad_out
        grad_final = grad_final if ctx.return_final_state else None
        args = (grad_out, grad_final, x, weight, bias, initial_state, cu_seqlens, ctx.silu, ctx.backend)
        if not torch.compiler.is_compiling() and in_torch_func_grad():
            grads = _CausalConv1dBackward.apply(*args)
        else:
            grads = _causal_conv1d_backward(*args)
        kept = [grad if want else None for grad, want in zip(grads, ctx.needs_input_grad[:4], strict=True)]
        return (*kept, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise RuntimeError(
            "causal_conv1d: the fused kernels have no forward-mode derivative; call with backend='reference' for one"
        )


_CausalConv1dBackward = differentiated_once("causal_conv1d", _causal_conv1d_backward)


@torch.library.impl(library, "causal_conv1d", "Autograd")
def _causal_conv1d_autograd(*args: Any) -> Any:
    if needs_grad(args):
        return _CausalConv1d.apply(*args)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return _causal_conv1d(*args)


@torch.library.impl(library, "causal_conv1d_backward", "Autograd")
def _causal_conv1d_backward_autograd(*args: Any) -> Any:
    if needs_grad(args):
        return _CausalConv1dBackward.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _causal_conv1d_backward(*args)
