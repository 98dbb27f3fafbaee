"""The one library in which PyTorch's dispatcher finds onchip's ops, as `torch.ops.onchip`."""

import torch
from torch._C._functorch import TransformType, peek_interpreter_stack

library = torch.library.Library("onchip", "DEF")  # type: ignore[no-untyped-call]


def in_torch_func_grad() -> bool:
    """Whether torch.func differentiates the call: it serves an autograd.Function above the dispatcher only."""
    transform = peek_interpreter_stack()
    return transform is not None and transform.key() in (TransformType.Grad, TransformType.Jvp)
