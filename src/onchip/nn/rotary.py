"""Rotary position embedding: pairs of features turned by an angle that grows with the position."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple, Self

import torch
from torch import Tensor


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    r"""Turn each pair of features of `x` by the angle of its position.

        y[2i] + √-1 · y[2i+1] = (x[2i] + √-1 · x[2i+1]) · (turns[i, 0] + √-1 · turns[i, 1])

    `x (..., T, H, D)`, D even; `turns (..., T, D/2, 2)` from a `RotaryTable`. Computed in float32 (float64 for float64)
    and returned in x's dtype.

    Source: Su et al., RoFormer (arXiv 2104.09864), equation 34. Neighbouring features form a pair, as there.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    pairs, turns = wide.view(*x.shape[:-1], x.shape[-1] // 2, 2), turns[..., None, :, :]
    if torch.compiler.is_compiling():  # Inductor fuses real arithmetic and has no complex
        (a, b), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:  # one kernel, three times as fast as the above without fusion
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
    return turned.view(x.shape).to(x.dtype)


class RotaryScaling(NamedTuple):
    """Slower turns, for sequences longer than those a model was first trained on, as Llama 3 has them.

    A pair that turns at most `low_freq_factor` times in `original_length` tokens turns `factor` times slower, one that
    turns at least `high_freq_factor` times as before, and the speeds between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    @classmethod
    def of(cls, values: Mapping[str, float]) -> Self:
        """The scaling with these fields.

        Raises:
            ValueError: missing or unknown fields, or values out of range.
        """
        if not isinstance(values, Mapping) or set(values) != set(cls._fields):
            raise ValueError(f"rope_scaling must have {', '.join(cls._fields)}, got {values!r}")
        scaling = cls(**values)  # type: ignore[arg-type]
        if not (scaling.factor >= 1 and scaling.high_freq_factor > scaling.low_freq_factor > 0):
            raise ValueError(
                f"rope_scaling must have factor ≥ 1 and high_freq_factor > low_freq_factor > 0, got {values}"
            )
        return scaling

    def __call__(self, frequencies: Tensor) -> Tensor:
        """The frequencies, in radians per token, as they are with this scaling."""
        turns = self.original_length * frequencies / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


class RotaryTable:
    """The turns (cos, sin)(t · base^(-2i/D)) of positions t = 0, 1, …, computed once and kept.

    With `scaling` the frequencies base^(-2i/D) are scaled first.

    Angles are computed in float64 (in float32 a position beyond 10⁵ would be off by hundredths of a radian), the turns
    kept in float32, in float64 for float64 models.

    Raises:
        ValueError: `head_dim` is odd, or `base` is not positive.

    >>> turns = RotaryTable(head_dim=8)(16, like=torch.randn(1))
    >>> turns.shape, turns[0, 0]
    (torch.Size([16, 4, 2]), tensor([1., 0.]))
    """

    def __init__(self, head_dim: int, base: float = 10_000.0, scaling: RotaryScaling | None = None) -> None:
        if head_dim % 2:
            raise ValueError(f"head_dim must be even for a rotary embedding, got {head_dim}")
        if not base > 0:
            raise ValueError(f"base must be positive, got {base}")
        self.head_dim = head_dim
        self.base = base
        self.scaling = scaling
        self._kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, length: int, like: Tensor) -> Tensor:
        """`(length, head_dim/2, 2)` on the device of `like` and in the precision that suits it."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        turns = self._kept.get((like.device, dtype))
        if turns is None or len(turns) < length:
            turns = self._compute(1 << max(length - 1, 0).bit_length(), like.device, dtype)
            if type(turns) is Tensor:  # not one that only stands for a tensor, as while a model is exported
                self._kept[like.device, dtype] = turns
        return turns[:length]

    # A table made while generating in inference mode must serve a later training step.
    @torch.inference_mode(False)
    def _compute(self, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        t = torch.arange(length, dtype=torch.float64, device=device)
        i = torch.arange(self.head_dim // 2, dtype=torch.float64, device=device)
        frequencies = self.base ** (-2 * i / self.head_dim)
        angles = torch.outer(t, frequencies if self.scaling is None else self.scaling(frequencies))
        return torch.stack([angles.cos(), angles.sin()], dim=-1).to(dtype)


@lru_cache(maxsize=16)
def rotary_table(head_dim: int, base: float, scaling: RotaryScaling | None = None) -> RotaryTable:
    """The table that all layers of these arguments share: at 10⁶ positions it takes hundreds of megabytes."""
    return RotaryTable(head_dim, base, scaling)


def packed_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Each row's place in its sequence, `(total,)`."""
    t = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    starts = cu_seqlens[torch.searchsorted(cu_seqlens[1:], t, right=True)]
    return (t - starts).clamp(min=0)  # negative only for boundaries that `attention` is about to refuse
