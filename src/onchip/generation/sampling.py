"""How the next token is drawn from the model's logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """A rule that draws one token from logits.

    Args:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: only the k most probable tokens, k ≥ 1; None for all.
        top_p: only the most probable tokens that together reach this probability, in (0, 1].
        min_p: only tokens at least this fraction as probable as the most probable one, in [0, 1].

    Each of the three limits judges the same distribution, the one at `temperature`; a token must pass them all.
    (Elsewhere each often judges what the one before it left, so that their order matters.)

    Raises:
        TypeError: `top_k` is not an integer.
        ValueError: a value out of range.

    Source: Holtzman et al. (arXiv 1904.09751) for top-p; Nguyen et al. (arXiv 2407.01082) for min-p.

    >>> logits = torch.tensor([[0.1, 2.0, 1.9, -3.0]])
    >>> Sampling(temperature=0.0).draw(logits, [torch.Generator()])
    tensor([1])
    >>> rule, generator = Sampling(top_k=2), torch.Generator().manual_seed(0)
    >>> sorted({rule.draw(logits, [generator]).item() for _ in range(50)})
    [1, 2]
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and not negative, got {self.temperature}")
        if self.top_k is not None and (not isinstance(self.top_k, int) or isinstance(self.top_k, bool)):
            raise TypeError(f"top_k must be an integer or None, got {self.top_k!r}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")

    def draw(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """One token `(B,)` from each row of `logits (B, V)`, with one uniform number from each row's CPU generator.

        Raises:
            RuntimeError: a logit is NaN.
        """
        if bool(logits.isnan().any()):
            raise RuntimeError("the model gives NaN: its weights are damaged, or its training diverged")
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        scaled = (logits - logits.amax(dim=-1, keepdim=True)).double() / self.temperature
        p, tokens = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        kept = p >= self.min_p * p[:, :1]
        if self.top_p < 1:
            kept &= p.cumsum(dim=-1) - p < self.top_p
        if self.top_k is not None:
            kept[:, self.top_k :] = False
        cumulative = (p * kept).cumsum(dim=-1)
        u = torch.cat([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
        target = u.to(p.device)[:, None] * cumulative[:, -1:]
        return tokens.gather(-1, torch.searchsorted(cumulative, target, right=True)).squeeze(-1)
