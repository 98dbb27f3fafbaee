"""Functions: tensors in, tensors out, differentiable. One folder per mathematical operation."""

from onchip.ops._select import explain
from onchip.ops.attention import attention, attention_with_lse
from onchip.ops.attention_fp8 import attention_fp8, attention_fp8_with_lse
from onchip.ops.attention_with_cache import attention_with_cache, attention_with_cache_and_lse
from onchip.ops.hadamard import hadamard
from onchip.ops.merge_attention import merge_attention
from onchip.ops.ssd import ssd, ssd_matrix, ssd_step

__all__ = [
    "attention",
    "attention_fp8",
    "attention_fp8_with_lse",
    "attention_with_cache",
    "attention_with_cache_and_lse",
    "attention_with_lse",
    "explain",
    "hadamard",
    "merge_attention",
    "ssd",
    "ssd_matrix",
    "ssd_step",
]
