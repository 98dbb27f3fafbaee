"""Functions: tensors in, tensors out, differentiable. One folder per mathematical operation."""

from onchip.ops._select import explain
from onchip.ops.attention import attention, attention_with_lse
from onchip.ops.attention.block_mask import BlockMask
from onchip.ops.attention_fp8 import attention_fp8, attention_fp8_with_lse
from onchip.ops.attention_with_cache import attention_with_cache, attention_with_cache_and_lse
from onchip.ops.causal_conv1d import causal_conv1d, causal_conv1d_matrix, causal_conv1d_step
from onchip.ops.hadamard import hadamard
from onchip.ops.linear import linear
from onchip.ops.merge_attention import merge_attention
from onchip.ops.rms_norm import rms_norm
from onchip.ops.selective_scan import selective_scan, selective_scan_matrix, selective_scan_step
from onchip.ops.ssd import ssd, ssd_matrix, ssd_step

__all__ = [
    "BlockMask",
    "attention",
    "attention_fp8",
    "attention_fp8_with_lse",
    "attention_with_cache",
    "attention_with_cache_and_lse",
    "attention_with_lse",
    "causal_conv1d",
    "causal_conv1d_matrix",
    "causal_conv1d_step",
    "explain",
    "hadamard",
    "linear",
    "merge_attention",
    "rms_norm",
    "selective_scan",
    "selective_scan_matrix",
    "selective_scan_step",
    "ssd",
    "ssd_matrix",
    "ssd_step",
]
