"""The causal convolution's registration with PyTorch's dispatcher: schema, kernels, fake kernel, autograd."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from onchip.ops._library import asked_for, backward_once, differentiated_by, library, no_forward_mode
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
            return (None,) * len(ctx.needs_input_grad)
        tensors = ctx.saved_tensors
        grad_out = torch.zeros_like(tensors[0]) if grad_out is None else grad_out
        grad_final = grad_final if ctx.return_final_state else None
        return asked_for(ctx, _backward_once(grad_out, grad_final, *tensors, ctx.silu, ctx.backend))

    jvp = no_forward_mode("causal_conv1d")


_backward_once = backward_once("causal_conv1d")
causal_conv1d: Callable[..., tuple[Tensor, Tensor]] = differentiated_by(_CausalConv1d, "causal_conv1d")
"""Call the op; arguments in the schema's order. A state that is not asked for has no elements."""
