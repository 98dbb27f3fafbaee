"""A step's registration with PyTorch's dispatcher: it updates the state in place, and has no gradient."""

from typing import Any, cast

import torch
from torch import Tensor

from onchip.ops._library import library
from onchip.ops._step import changed, differentiated
from onchip.ops.selective_scan.op import implementation

library.define(  # type: ignore[no-untyped-call]
    "selective_scan_step(Tensor x_t, Tensor(a!) state, Tensor dt_t, Tensor A, Tensor B_t, Tensor C_t, Tensor? D, "
    "Tensor? z, Tensor? dt_bias, bool dt_softplus, str? backend) -> Tensor"
)

_step = torch.ops.onchip.selective_scan_step.default


def step(*args: Any) -> Tensor:
    """Call the op; arguments in the schema's order.

    The autograd kernel is called here, past the dispatcher: decoding makes this call in every layer for every token.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return cast(Tensor, _step(*args))
    return _without_gradient(*args)


def _forward(*args: Any) -> Tensor:
    *inputs, backend = args
    return cast(Tensor, implementation(args[0], backend).step(*inputs))


for _device in ("CPU", "CUDA"):
    library.impl("selective_scan_step", _forward, _device)  # type: ignore[no-untyped-call]


@torch.library.register_fake("onchip::selective_scan_step", lib=library)  # type: ignore[untyped-decorator]
def _(x_t: Tensor, *more: Any) -> Tensor:
    return torch.empty_like(x_t)


@torch.library.impl(library, "selective_scan_step", "Autograd")
def _without_gradient(*args: Any) -> Tensor:
    if differentiated(*args[:9]):
        raise RuntimeError("selective_scan_step: the op updates the state in place; the public function has a gradient")
    with torch._C._AutoDispatchBelowAutograd():
        result = _step(*args)
    changed(args[1])
    return cast(Tensor, result)
