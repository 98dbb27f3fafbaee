"""The selective scan's registration with PyTorch's dispatcher: schema, kernels, fake kernels, autograd."""

from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from onchip.ops._library import differentiated_once, in_torch_func_grad, library, needs_grad
from onchip.ops.selective_scan import cpu
from onchip.ops.selective_scan.arguments import Call

_CALL = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? cu_seqlens, bool dt_softplus"
)
library.define(  # type: ignore[no-untyped-call]
    f"selective_scan({_CALL}, bool save, str? backend=None) -> (Tensor out, Tensor final_state, Tensor checkpoints)"
)
library.define(  # type: ignore[no-untyped-call]
    f"selective_scan_backward(Tensor grad_out, Tensor? grad_state, Tensor checkpoints, {_CALL}, str? backend=None) -> "
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor z, Tensor dt_bias, Tensor initial_state)"
)

_selective_scan = torch.ops.onchip.selective_scan.default
_selective_scan_backward = torch.ops.onchip.selective_scan_backward.default
_Results = tuple[Tensor, Tensor, Tensor]


def selective_scan(call: Call, backend: str | None) -> _Results:
    """Call the op; torch.func differentiates an autograd.Function only where it is above the dispatcher."""
    if not torch.compiler.is_compiling() and in_torch_func_grad():
        return cast(_Results, _SelectiveScan.apply(*call, backend))  # type: ignore[no-untyped-call]
    return cast(_Results, _selective_scan(*call, False, backend))


def implementation(x: Tensor, backend: str | None) -> Any:
    """The module that serves a call on x's device."""
    # Imported late: it brings Triton, for which `import onchip` should not wait.
    return import_module("onchip.ops.selective_scan.triton") if x.is_cuda or backend == "triton" else cpu


def _forward(*args: Any) -> _Results:
    call, save, backend = _split(args, 12)
    return cast(_Results, implementation(call.x, backend).forward(call, save[0]))


def _backward(*args: Any) -> tuple[Tensor, ...]:
    call, _, backend = _split(args[3:], 11)
    return cast(tuple[Tensor, ...], implementation(call.x, backend).backward(*args[:3], call))


def _split(args: tuple[Any, ...], count: int) -> tuple[Call, tuple[Any, ...], str | None]:
    """The call, what follows it, and the backend, which the dispatcher leaves out where it is None."""
    return Call(*args[:11]), args[11:count], args[count] if len(args) > count else None


for _device in ("CPU", "CUDA"):
    library.impl("selective_scan", _forward, _device)  # type: ignore[no-untyped-call]
    library.impl("selective_scan_backward", _backward, _device)  # type: ignore[no-untyped-call]


@torch.library.register_fake("onchip::selective_scan", lib=library)  # type: ignore[untyped-decorator]
def _(*args: Any, backend: str | None = None) -> _Results:
    call, save, _ = _split(args, 12)
    return call.results(save[0])


@torch.library.register_fake("onchip::selective_scan_backward", lib=library)  # type: ignore[untyped-decorator]
def _(*args: Any, backend: str | None = None) -> tuple[Tensor, ...]:
    return _split(args[3:], 11)[0].gradients()


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _selective_scan(*args[:11], True, args[11])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Results) -> None:
        *tensors, ctx.dt_softplus, ctx.backend = inputs
        ctx.save_for_backward(output[2], *tensors)
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_state is None:
            return (None,) * 12
        checkpoints, x, *more = ctx.saved_tensors
        grad_out = torch.zeros_like(x) if grad_out is None else grad_out
        args = (grad_out, grad_state, checkpoints, x, *more, ctx.dt_softplus, ctx.backend)
        if not torch.compiler.is_compiling() and in_torch_func_grad():
            grads = _SelectiveScanBackward.apply(*args)
        else:
            grads = _selective_scan_backward(*args)
        kept = [grad if want else None for grad, want in zip(grads, ctx.needs_input_grad[:9], strict=True)]
        return (*kept, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise RuntimeError(
            "selective_scan: the fused kernels have no forward-mode derivative; call with backend='reference' for one"
        )


_SelectiveScanBackward = differentiated_once("selective_scan", _selective_scan_backward)


@torch.library.impl(library, "selective_scan", "Autograd")
def _selective_scan_autograd(*args: Any) -> Any:
    if needs_grad(args):
        call, _, backend = _split(args, 12)
        return _SelectiveScan.apply(*call, backend)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return _selective_scan(*args)


@torch.library.impl(library, "selective_scan_backward", "Autograd")
def _selective_scan_backward_autograd(*args: Any) -> Any:
    if needs_grad(args):
        return _SelectiveScanBackward.apply(*args, *(None,) * (15 - len(args)))
    with torch._C._AutoDispatchBelowAutograd():
        return _selective_scan_backward(*args)
