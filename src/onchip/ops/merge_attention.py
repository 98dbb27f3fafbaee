"""Attention over disjoint sets of keys, merged into attention over their union.

Not a registered op: it is a few elementwise expressions, bound by memory traffic, which PyTorch traces, fuses and
differentiates any number of times as they stand. There is nothing that a kernel of our own would keep on chip.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from onchip.ops.attention.checks import DTYPES


def merge_attention(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    r"""Attention over the union of disjoint sets of keys, from its results over each of them.

    For the results (out_p, lse_p) of `onchip.attention_with_lse` for the same queries, one for each set p of keys:

        lse = log Σ_p exp lse_p
        out = Σ_p exp(lse_p - lse) · out_p

    So one prefix's keys may serve many sequences, and keys may be split over devices, calls or masks. A sink is one
    more key: it goes into exactly one of the parts. Masks that depend on positions (causal, windows, ALiBi) count
    positions within a part.

    Args:
        outs: the parts' outputs, a sequence of `(B, T, H, Dv)` or, packed, `(total, H, Dv)`, or one tensor of them
            stacked in front; float64, float32, bfloat16 or float16; any strides.
        lses: the parts' log-sum-exps, natural, a sequence of `(B, H, T)` or `(H, total)`, or one tensor of them
            stacked; floating, below +inf. -inf says that the row saw no key of the part: whatever its output holds,
            NaN too, is left out.

    Returns:
        `out` in the shape and dtype of one part's, and `lse` in the shape of one part's, float32 or, where either
        argument is, float64. A row that saw nothing in any part has zeros and -inf.

    Raises:
        ValueError: no parts, not one log-sum-exp for each output, or shapes that do not fit.
        TypeError: what is not a tensor, or dtypes and devices that do not fit.

    Numerics: float32, float64 where either argument is; one rounding to the output's dtype. Parts that were rounded to
    a 16-bit type keep that error. Where a row saw nothing, gradients are zero, never NaN, of any order.
    Cost: 2·B·T·H·Dv operations a part. Bound by memory: uncompiled, each step passes over a part's output in float32.
    Differentiable in outs and lses, any number of times.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv 1805.02867, section 3.1); merged
    at the end as in Flash-Decoding (Dao et al., 2023) and for shared prefixes in Hydragen (Juravsky et al., arXiv
    2402.05099, section 3.1). Here the parts' number is free, empty ones are exact, and gradients flow through both.

    >>> import torch, onchip
    >>> q, k, v = torch.randn(3, 1, 16, 2, 8).unbind(0)
    >>> parts = [onchip.attention_with_lse(q, k[:, keys], v[:, keys]) for keys in (slice(0, 5), slice(5, 16))]
    >>> out, lse = onchip.merge_attention(*zip(*parts))
    >>> torch.allclose(out, onchip.attention(q, k, v), atol=1e-5)
    True
    """
    outs, lses = _parts("outs", outs), _parts("lses", lses)
    _check(outs, lses)
    dtype = torch.promote_types(torch.promote_types(outs[0].dtype, lses[0].dtype), torch.float32)
    logits = torch.stack([x.to(dtype) for x in lses])
    hidden = logits == -math.inf
    empty = hidden.all(dim=0)
    # A row that is -inf throughout is replaced before it meets exp or log, so that no derivative of theirs is NaN.
    logits = logits.masked_fill(empty, 0.0)
    lse = logits.logsumexp(dim=0)
    weights = logits.softmax(dim=0).masked_fill(hidden, 0.0)  # exp(lse_p - lse), without the rounding of a large lse
    out = torch.zeros((), dtype=dtype, device=outs[0].device)
    for part, weight, unseen in zip(outs, weights, hidden, strict=True):
        out = out + _beside(weight) * part.to(dtype).masked_fill(_beside(unseen), 0.0)
    return out.to(outs[0].dtype), lse.masked_fill(empty, -math.inf)


def _beside(x: Tensor) -> Tensor:
    """A log-sum-exp's layout, (B, H, T), turned into an output's, (B, T, H, 1)."""
    return x.transpose(-1, -2)[..., None]


def _parts(name: str, given: Sequence[Tensor] | Tensor) -> Sequence[Tensor]:
    if isinstance(given, Tensor):
        if given.ndim == 0:
            raise ValueError(f"{name} must be a sequence of tensors, or one of them stacked, got a scalar")
        return given.unbind(0)
    if not isinstance(given, Sequence):
        raise TypeError(f"{name} must be a sequence of tensors, or one of them stacked, got {type(given).__name__}")
    return given


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must have one entry per part, at least one, got {len(outs)} and {len(lses)}")
    for name, parts in (("outs", outs), ("lses", lses)):
        for p, x in enumerate(parts):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}[{p}] must be a tensor, got {type(x).__name__}")
            if x.dtype not in DTYPES or x.dtype != parts[0].dtype or x.device != outs[0].device:
                raise TypeError(
                    f"{name}[{p}] must be floating, of one dtype with the other parts and on {outs[0].device}, "
                    f"got ({x.dtype}, {x.device})"
                )
    shape = outs[0].shape
    if len(shape) not in (3, 4):
        raise ValueError(f"outs must have 4 dimensions, (B, T, H, Dv), or 3, (total, H, Dv), got shape {tuple(shape)}")
    rows = (*shape[:-3], shape[-2], shape[-3])
    for name, parts, want in (("outs", outs, tuple(shape)), ("lses", lses, rows)):
        for p, x in enumerate(parts):
            if x.shape != want:
                raise ValueError(
                    f"{name}[{p}] must have shape {want}, as outs[0] has {tuple(shape)}, got {tuple(x.shape)}"
                )
