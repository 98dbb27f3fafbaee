"""onchip: exact, IO-aware operations and models for long sequences.

>>> import torch, onchip
>>> q, k, v = torch.randn(3, 1, 128, 4, 32).unbind(0)  # (batch, time, heads, dim)
>>> onchip.attention(q, k, v, causal=True).shape
torch.Size([1, 128, 4, 32])
"""

from onchip.ops import attention, attention_with_lse, explain

__all__ = ["__version__", "attention", "attention_with_lse", "explain"]
__version__ = "0.1.0"
