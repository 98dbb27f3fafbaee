"""S4D: state space layers whose state matrix is diagonal."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from onchip.nn import hippo
from onchip.nn.mixers.filters import TimeInvariantFilters, as_parameter, check_state_size
from onchip.nn.state_space import LinearSystem

Init = Literal["legs", "inv", "lin", "real"]


class S4D(TimeInvariantFilters):
    r"""The diagonal state space layer: for each channel of `x (B, T, d_model)`, with its own A, C, D and dt,

        x'[n] = A[n]·x[n] + u,    y = 2 Re(Σ_n C[n]·x[n]) + D·u,    out(gelu(y))

    with A[n] = -exp(log_decay) + √-1·frequency, n = 0 … N/2 - 1, one of each conjugate pair, which starts as

        legs   the eigenvalues of the normal part of HiPPO-LegS         lin   -½ + √-1·π·n
        inv    -½ + √-1·(N/π)·(N/(2n + 1) - 1)                          real  -(n + 1), n = 0 … N - 1, and stays real

    B is 1, since C has its freedom.

    Args:
        d_model: features in and out, and channels.
        d_state: numbers in a channel's state, N; even but for "real": N/2 complex ones.
        init: which A to start from: "legs", "inv", "lin" or "real".
        discretization: "zoh" or "bilinear".
        dt_min, dt_max: dt starts log-uniform between them.

    Raises:
        TypeError: a size that is no integer.
        ValueError: an unknown start or discretisation, a state size that does not fit, steps out of order.

    Cost: of the kernel 4·d_model·N·T operations for a Vandermonde matrix that is never written, memory
    d_model·(T + N·√T); a step some 10·d_model·N.

    Source: Gu et al., S4D (arXiv 2206.11893). C starts standard normal.

    >>> import torch
    >>> mixer = S4D(16, d_state=8, init="lin")
    >>> x = torch.randn(2, 10, 16)
    >>> head, state = mixer(x[:, :6], mixer.initial_state(batch=2))
    >>> y_6, state = mixer.step(x[:, 6], state)
    >>> torch.allclose(y_6, mixer(x)[:, 6], atol=1e-5)
    True
    """

    undecayed = ("log_decay", "frequency")

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        init: Init = "legs",
        discretization: Literal["zoh", "bilinear"] = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        if init not in get_args(Init):
            raise ValueError(f"init must be one of {', '.join(get_args(Init))}, got {init!r}")
        if discretization not in ("zoh", "bilinear"):
            raise ValueError(f"discretization must be zoh or bilinear, got {discretization!r}")
        is_complex = init != "real"
        check_state_size(d_state, even=is_complex)
        size = d_state // 2 if is_complex else d_state
        super().__init__(d_model, size, is_complex, dt_min, dt_max)
        self.discretization = discretization
        decay, frequency = _eigenvalues(init, d_state)
        self.log_decay = as_parameter(decay.log(), d_model)
        self.frequency = as_parameter(frequency, d_model) if is_complex else None
        self.C = nn.Parameter(torch.randn(d_model, size, 2) if is_complex else torch.randn(d_model, size))

    def _discretize(self) -> LinearSystem:
        decay, C, log_dt = (x.to(self._dtype) for x in (self.log_decay, self.C, self.log_dt))
        A, dt = -decay.exp(), log_dt.exp()[:, None]
        if self.frequency is not None:
            A, C = torch.complex(A, self.frequency.to(self._dtype)), 2 * torch.view_as_complex(C)
        if self.discretization == "zoh":
            return LinearSystem(torch.exp(dt * A), torch.expm1(dt * A) / A, C)
        return LinearSystem((1 + dt / 2 * A) / (1 - dt / 2 * A), dt / (1 - dt / 2 * A), C)


def _eigenvalues(init: Init, N: int) -> tuple[Tensor, Tensor]:
    """Decays and frequencies, float64 on the CPU."""
    if init == "real":
        n = torch.arange(N, dtype=torch.float64, device="cpu")
        return n + 1, torch.zeros_like(n)
    n = torch.arange(N // 2, dtype=torch.float64, device="cpu")
    if init == "legs":
        Lambda = hippo.low_rank("legs", N).Lambda
        return -Lambda.real, Lambda.imag
    return torch.full_like(n, 0.5), math.pi * n if init == "lin" else N / math.pi * (N / (2 * n + 1) - 1)
