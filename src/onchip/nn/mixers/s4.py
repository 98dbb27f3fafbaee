"""S4: state space layers whose state matrix is diagonal plus low rank."""

import torch
from torch import nn

from onchip.nn import hippo
from onchip.nn.mixers.filters import TimeInvariantFilters, as_parameter, check_state_size
from onchip.nn.state_space import LowRankSystem

_MIN_DECAY = 1e-4


class S4(TimeInvariantFilters):
    r"""The structured state space layer: for each channel of `x (B, T, d_model)`, with its own Λ, P, B, C, D and dt,

        x'(s) = (Λ - P P*) x(s) + B u(s),    y(s) = 2 Re(C x(s)) + D u(s),    out(gelu(y))

    by the bilinear rule. Λ, P and B start as a HiPPO system in the basis that makes it diagonal plus low rank, one of
    each conjugate pair; Λ = -exp(log_decay) + √-1·frequency, so that no channel can grow.

    Args:
        d_model: features in and out, and channels.
        d_state: numbers in a channel's state, N, even: N/2 complex ones.
        measure: the HiPPO measure that Λ, P and B start from. "legs" is S4's own.
        dt_min, dt_max: dt starts log-uniform between them.

    Raises:
        TypeError: a size that is no integer.
        ValueError: an unknown measure, a state size that is odd or not positive, steps out of order.

    Cost: of the kernel 16·d_model·N·T operations for a Cauchy matrix, and 2·d_model·N³·log₂ T for Ā^T, since C is what
    is learned (see `onchip.nn.state_space.LowRankSystem`); a step some 16·d_model·N. A chunk that carries a state
    takes the dense Ā.

    Source: Gu et al., S4 (arXiv 2111.00396). C starts standard normal. Where a measure's eigenvalues have no decay (all
    but "legs"), they start with one of 1e-4.

    >>> import torch
    >>> mixer = S4(16, d_state=8)
    >>> x = torch.randn(2, 10, 16)
    >>> y_0, state = mixer.step(x[:, 0], mixer.initial_state(batch=2))
    >>> y_1, state = mixer.step(x[:, 1], state)
    >>> torch.allclose(torch.stack([y_0, y_1], dim=1), mixer(x)[:, :2], atol=1e-5)
    True
    """

    undecayed = ("log_decay", "frequency", "P", "B")

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        measure: hippo.Measure = "legs",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        check_state_size(d_state, even=True)
        super().__init__(d_model, d_state // 2, is_complex=True, dt_min=dt_min, dt_max=dt_max)
        form = hippo.low_rank(measure, d_state)
        self.log_decay = as_parameter((-form.Lambda.real).clamp_min(_MIN_DECAY).log(), d_model)
        self.frequency = as_parameter(form.Lambda.imag, d_model)
        self.P = as_parameter(form.P.mT, d_model)
        self.B = as_parameter(form.B, d_model)
        self.C = nn.Parameter(torch.randn(d_model, d_state // 2, 2))

    def _discretize(self) -> LowRankSystem:
        P, B, C = (torch.view_as_complex(x.to(self._dtype)) for x in (self.P, self.B, self.C))
        decay, frequency, log_dt = (x.to(self._dtype) for x in (self.log_decay, self.frequency, self.log_dt))
        return LowRankSystem.bilinear(torch.complex(-decay.exp(), frequency), P, B, C, log_dt.exp())
