"""A step's registration with PyTorch's dispatcher: it updates the state in place, and has no gradient."""

from typing import Any, cast

import torch
from torch import Tensor

from onchip.ops._library import library
from onchip.ops._step import changed, differentiated
from onchip.ops.causal_conv1d.op import implementation

library.define(  # type: ignore[no-untyped-call]
    "causal_conv1d_step(Tensor x_t, Tensor(a!) state, Tensor weight, Tensor? bias, bool silu, str? backend) -> Tensor"
)

_step = torch.ops.onchip.causal_conv1d_step.default


def step(*args: Any) -> Tensor:
    """Call the op; arguments in the schema's order. The state has W - 1 rows or more; the filter sees the last.

    The autograd kernel is called here, past the dispatcher: decoding makes this call in every layer for every token.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return cast(Tensor, _step(*args))
    return _without_gradient(*args)


def _forward(
    x_t: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, backend: str | None
) -> Tensor:
    return cast(Tensor, implementation(x_t, backend).step(x_t, state, weight, bias, silu))


for _device in ("CPU", "CUDA"):
    library.impl("causal_conv1d_step", _forward, _device)  # type: ignore[no-untyped-call]


@torch.library.register_fake("onchip::causal_conv1d_step", lib=library)  # type: ignore[untyped-decorator]
def _(x_t: Tensor, *more: Any) -> Tensor:
    return x_t.new_empty(x_t.shape)


@torch.library.impl(library, "causal_conv1d_step", "Autograd")
def _without_gradient(*args: Any) -> Tensor:
    if differentiated(*args[:4]):
        raise RuntimeError("causal_conv1d_step: the op updates the state in place; the public function has a gradient")
    with torch._C._AutoDispatchBelowAutograd():
        result = _step(*args)
    changed(args[1])
    return cast(Tensor, result)
