"""onchip: exact, IO-aware operations and models for long sequences.

>>> import torch, onchip
>>> q, k, v = torch.randn(3, 1, 128, 4, 32).unbind(0)  # (batch, time, heads, dim)
>>> onchip.attention(q, k, v, causal=True).shape
torch.Size([1, 128, 4, 32])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onchip.ops import (
        BlockMask,
        attention,
        attention_fp8,
        attention_fp8_with_lse,
        attention_with_cache,
        attention_with_cache_and_lse,
        attention_with_lse,
        causal_conv1d,
        causal_conv1d_matrix,
        causal_conv1d_step,
        explain,
        hadamard,
        linear,
        merge_attention,
        rms_norm,
        selective_scan,
        selective_scan_matrix,
        selective_scan_step,
        ssd,
        ssd_matrix,
        ssd_step,
    )

__all__ = [
    "BlockMask",
    "__version__",
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
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The functions bring torch, which takes seconds to load: the command line answers --help without it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from onchip import ops

    globals()[name] = value = getattr(ops, name)
    return value


def __dir__() -> list[str]:
    return __all__
