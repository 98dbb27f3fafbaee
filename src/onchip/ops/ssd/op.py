"""The registration of ssd and its step with PyTorch's dispatcher: schema, kernels, fake kernels, autograd."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from onchip.ops._library import asked_for, backward_once, differentiated_by, library, no_forward_mode
from onchip.ops._sequence import STATE_DTYPES
from onchip.ops._step import changed
from onchip.ops.ssd import cpu
from onchip.ops.ssd.call import Call

_ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? cu_seqlens, bool dt_softplus, float dt_low, float dt_high, SymInt? chunk_size, str? backend"
)
_STEP_ARGUMENTS = (
    "Tensor x_t, Tensor state, Tensor dt_t, Tensor A, Tensor B_t, Tensor C_t, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, float dt_low, float dt_high, str? backend"
)
_TENSORS = 10  # the first of the arguments

library.define(f"ssd({_ARGUMENTS}) -> (Tensor out, Tensor final_state)")  # type: ignore[no-untyped-call]
library.define(  # type: ignore[no-untyped-call]
    f"ssd_backward(Tensor grad_out, Tensor? grad_state, {_ARGUMENTS}) -> (Tensor grad_x, Tensor grad_dt, "
    "Tensor grad_A, Tensor grad_B, Tensor grad_C, Tensor grad_D, Tensor grad_z, Tensor grad_dt_bias, "
    "Tensor grad_initial_state)"
)
library.define(f"ssd_step({_STEP_ARGUMENTS}) -> (Tensor y, Tensor state)")  # type: ignore[no-untyped-call]
library.define(f"ssd_step_into({_STEP_ARGUMENTS}, Tensor(a!) out_state) -> Tensor y")  # type: ignore[no-untyped-call]

_ssd = torch.ops.onchip.ssd.default
_ssd_step = torch.ops.onchip.ssd_step.default
_ssd_step_into = torch.ops.onchip.ssd_step_into.default


def ssd_step(*args: Any, out_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Call the step's op, which has no gradient; arguments in the schema's order."""
    if out_state is None:
        return cast(tuple[Tensor, Tensor], _ssd_step(*args))
    return cast(Tensor, _ssd_step_into(*args, out_state)), out_state


def _implementation(x: Tensor, backend: str | None) -> Any:
    # Imported late: it brings Triton, for which `import onchip` should not wait.
    in_triton = x.is_cuda or backend == "triton"
    return import_module("onchip.ops.ssd.triton") if in_triton else cpu


def _forward(*args: Any) -> Any:
    return _implementation(args[0], args[-1]).forward(Call(*args[:-1]))


def _backward(grad_out: Tensor, grad_state: Tensor | None, *args: Any) -> Any:
    return _implementation(args[0], args[-1]).backward(grad_out, grad_state, Call(*args[:-1]))


def _step_into(*args: Any) -> Tensor:
    x_t, state, *inputs, backend, out_state = args
    if _overlap(state, out_state):
        state = state.clone()
    return cast(Tensor, _implementation(args[0], backend).step(x_t, state, *inputs, out_state))


def _overlap(state: Tensor, out_state: Tensor) -> bool:
    """Whether writing the one may change the other before it is read: not where they are the same."""
    places = [(x.data_ptr(), x.dtype, x.stride()) for x in (state, out_state)]
    storages = [x.untyped_storage().data_ptr() for x in (state, out_state)]
    return storages[0] == storages[1] and places[0] != places[1]


def _step(*args: Any) -> tuple[Tensor, Tensor]:
    state = _new_state(*args)
    return _step_into(*args, state), state


def _new_state(x_t: Tensor, state: Tensor, *more: Any) -> Tensor:
    return torch.empty(state.shape, dtype=STATE_DTYPES[x_t.dtype], device=state.device)


for _device in ("CPU", "CUDA"):
    library.impl("ssd", _forward, _device)  # type: ignore[no-untyped-call]
    library.impl("ssd_backward", _backward, _device)  # type: ignore[no-untyped-call]
    library.impl("ssd_step", _step, _device)  # type: ignore[no-untyped-call]
    library.impl("ssd_step_into", _step_into, _device)  # type: ignore[no-untyped-call]


@torch.library.register_fake("onchip::ssd", lib=library)  # type: ignore[untyped-decorator]
def _(*args: Any) -> tuple[Tensor, Tensor]:
    return Call(*args[:-1]).results()


@torch.library.register_fake("onchip::ssd_backward", lib=library)  # type: ignore[untyped-decorator]
def _(grad_out: Tensor, grad_state: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return Call(*args[:-1]).gradients()


@torch.library.register_fake("onchip::ssd_step", lib=library)  # type: ignore[untyped-decorator]
def _(x_t: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    return x_t.new_empty(x_t.shape), _new_state(x_t, *more)


@torch.library.register_fake("onchip::ssd_step_into", lib=library)  # type: ignore[untyped-decorator]
def _(x_t: Tensor, *more: Any) -> Tensor:
    return x_t.new_empty(x_t.shape)


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _ssd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:_TENSORS])
        ctx.settings = inputs[_TENSORS:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        if grad_out is None and grad_state is None:
            return (None,) * len(ctx.needs_input_grad)
        grad_out = torch.zeros_like(tensors[0]) if grad_out is None else grad_out
        return asked_for(ctx, _backward_once(grad_out, grad_state, *tensors, *ctx.settings))

    jvp = no_forward_mode("ssd")


_backward_once = backward_once("ssd")
ssd: Callable[..., tuple[Tensor, Tensor]] = differentiated_by(_Ssd, "ssd")
"""Call the op; arguments in the schema's order."""


def _without_gradient(op: Any, *, writes: bool = False) -> Callable[..., Any]:
    """The kernel of autograd for an op that has none; with `writes` its last argument is written into."""

    def kernel(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise RuntimeError("ssd_step: the kernels have no gradient; call with backend='reference' for one")
        with torch._C._AutoDispatchBelowAutograd():
            result = op(*args)
        if writes:
            changed(args[-1])
        return result

    return kernel


library.impl("ssd_step", _without_gradient(_ssd_step), "Autograd")  # type: ignore[no-untyped-call]
library.impl("ssd_step_into", _without_gradient(_ssd_step_into, writes=True), "Autograd")  # type: ignore[no-untyped-call]
