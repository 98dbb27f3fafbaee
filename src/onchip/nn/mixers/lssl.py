"""LSSL: state space layers with a dense state matrix, the general case that S4 and S4D are structured cases of."""

from typing import Literal, cast

import torch
from torch import nn

from onchip.nn import hippo
from onchip.nn.mixers.filters import TimeInvariantFilters, as_buffer, as_parameter, check_state_size
from onchip.nn.state_space import LinearSystem


class LSSL(TimeInvariantFilters):
    r"""The linear state space layer: for each channel of `x (B, T, d_model)`, with its own step dt,

        x'(s) = A x(s) + B u(s),    y(s) = C x(s) + D u(s),    out(gelu(y))

    made discrete by `discretization`. In parallel it is a convolution with the kernel C Āˡ B̄, in steps a recurrence.

    Args:
        d_model: features in and out, and channels.
        d_state: numbers in a channel's state, N.
        measure: the HiPPO measure that A and B start from ("legs" without its division by time, as published).
        discretization: "bilinear" as published, "backward" or "zoh".
        learn_transition: learn A and B too, which the channels share; otherwise they stay, and only C, D and dt are
            learned.
        dt_min, dt_max: dt starts log-uniform between them.

    Raises:
        TypeError: a size that is no integer.
        ValueError: an unknown measure or discretisation, a state size that is not positive, steps out of order.

    Cost: of the kernel 2·d_model·N³·log₂ T operations for powers of Ā, and 2·d_model·N·T; a step d_model·2·N².

    Source: Gu et al., LSSL (arXiv 2110.13985). C starts standard normal. One output for each input channel.

    >>> import torch
    >>> mixer = LSSL(16, d_state=8)
    >>> x = torch.randn(2, 10, 16)
    >>> head, state = mixer(x[:, :6], mixer.initial_state(batch=2))
    >>> tail, state = mixer(x[:, 6:], state)
    >>> torch.allclose(torch.cat([head, tail], dim=1), mixer(x), atol=1e-5)
    True
    """

    A: torch.Tensor
    B: torch.Tensor

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        measure: hippo.Measure = "legs",
        discretization: Literal["bilinear", "backward", "zoh"] = "bilinear",
        learn_transition: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        check_state_size(d_state, even=False)
        if discretization not in ("bilinear", "backward", "zoh"):
            raise ValueError(f"discretization must be bilinear, backward or zoh, got {discretization!r}")
        super().__init__(d_model, d_state, is_complex=False, dt_min=dt_min, dt_max=dt_max)
        self.discretization = discretization
        self.undecayed = ("A",) if learn_transition else ()
        for name, value in zip("AB", hippo.transition(measure, d_state), strict=True):
            if learn_transition:
                self.register_parameter(name, as_parameter(value))
            else:
                self.register_buffer(name, as_buffer(value))
        self.C = nn.Parameter(torch.randn(d_model, d_state))

    def _discretize(self) -> LinearSystem:
        A, B, C, log_dt = (x.to(self._dtype) for x in (self.A, self.B, self.C, self.log_dt))
        A, B = hippo.discretize(A, B, log_dt.exp(), cast(hippo.Method, self.discretization))
        return LinearSystem(A, B, C)
