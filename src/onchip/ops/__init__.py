"""Functions: tensors in, tensors out, differentiable. One folder per mathematical operation."""

from onchip.ops._select import explain
from onchip.ops.attention import attention, attention_with_lse

__all__ = ["attention", "attention_with_lse", "explain"]
