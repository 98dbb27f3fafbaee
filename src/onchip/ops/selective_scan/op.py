"""The selective scan's registration with PyTorch's dispatcher: schema, kernels, fake kernels, autograd."""

from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from onchip.ops._library import asked_for, backward_once, differentiated_by, library, no_forward_mode
from onchip.ops.selective_scan import cpu
from onchip.ops.selective_scan.arguments import Call

_CALL = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? cu_seqlens, bool dt_softplus"
)
library.define(  # type: ignore[no-untyped-call]
    f"selective_scan({_CALL}, bool save, str? backend) -> (Tensor out, Tensor final_state, Tensor checkpoints)"
)
library.define(  # type: ignore[no-untyped-call]
    f"selective_scan_backward(Tensor grad_out, Tensor? grad_state, Tensor checkpoints, {_CALL}, str? backend) -> "
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor z, Tensor dt_bias, Tensor initial_state)"
)

_selective_scan = torch.ops.onchip.selective_scan.default
_Results = tuple[Tensor, Tensor, Tensor]


def selective_scan(call: Call, backend: str | None) -> _Results:
    """Call the op, which saves checkpoints where it is differentiated."""
    return cast(_Results, _call(*call, False, backend))


def implementation(x: Tensor, backend: str | None) -> Any:
    """The module that serves a call on x's device."""
    # Imported late: it brings Triton, for which `import onchip` should not wait.
    return import_module("onchip.ops.selective_scan.triton") if x.is_cuda or backend == "triton" else cpu


def _forward(*args: Any) -> _Results:
    *call, save, backend = args
    return cast(_Results, implementation(args[0], backend).forward(Call(*call), save))


def _backward(grad_out: Tensor, grad_state: Tensor | None, checkpoints: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *call, backend = args
    kernels = implementation(args[0], backend)
    return cast(tuple[Tensor, ...], kernels.backward(grad_out, grad_state, checkpoints, Call(*call)))


for _device in ("CPU", "CUDA"):
    library.impl("selective_scan", _forward, _device)  # type: ignore[no-untyped-call]
    library.impl("selective_scan_backward", _backward, _device)  # type: ignore[no-untyped-call]


@torch.library.register_fake("onchip::selective_scan", lib=library)  # type: ignore[untyped-decorator]
def _(*args: Any) -> _Results:
    *call, save, _backend = args
    return Call(*call).results(save)


@torch.library.register_fake("onchip::selective_scan_backward", lib=library)  # type: ignore[untyped-decorator]
def _(grad_out: Tensor, grad_state: Tensor | None, checkpoints: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return Call(*args[:-1]).gradients()


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        *call, _save, backend = args
        with torch._C._AutoDispatchBelowAutograd():
            return _selective_scan(*call, True, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Results) -> None:
        *tensors, ctx.dt_softplus, _save, ctx.backend = inputs
        ctx.save_for_backward(output[2], *tensors)
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_state is None:
            return (None,) * len(ctx.needs_input_grad)
        checkpoints, *tensors = ctx.saved_tensors
        grad_out = torch.zeros_like(tensors[0]) if grad_out is None else grad_out
        return asked_for(ctx, _backward_once(grad_out, grad_state, checkpoints, *tensors, ctx.dt_softplus, ctx.backend))

    jvp = no_forward_mode("selective_scan")


_backward_once = backward_once("selective_scan")
_call = differentiated_by(_SelectiveScan, "selective_scan")
