"""Mamba-2's mixer: a selective state space of heads, whose decay is one number each."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from onchip.nn.conv import CausalConv1d
from onchip.nn.linear import Linear
from onchip.nn.mixers.selective import Selected, Selective, initial_dt_bias
from onchip.nn.norm import RMSNormGated
from onchip.ops import ssd, ssd_matrix, ssd_step
from onchip.ops._count import check_sizes


class Mamba2(Selective):
    r"""Mamba-2's state space duality: heads with a matrix of memory each, that fades at a pace which the input sets.

    For `x (B, T, d_model)` and every head h of n_heads = expand · d_model / head_dim:

        z, u, B, C, dt = in_proj(x)
        u, B, C        = silu(conv(u, B, C))           a causal convolution of d_conv taps
        δ              = clamp(softplus(dt + dt_bias), *dt_limit),    A = -exp(A_log)
        S[t]           = exp(δ[t] A) S[t-1] + δ[t] u[t] B[t]ᵀ
        y[t]           = out(norm(S[t] C[t] + D u[t], z[t]))

    As a matrix, per head: M[i, j] = (C[i] · B[j]) exp(A Σ_{j<k≤i} δ[k]) δ[j]; `matrix` is `(B, n_heads, T, T)`, and
    what it is applied to is u, after the convolution.

    Args:
        d_model: features in and out.
        d_state: columns of a head's memory.
        d_conv: taps of the convolution.
        expand: d_inner = expand · d_model features within.
        head_dim: features per head, rows of its memory; a divisor of d_inner.
        n_groups: heads are divided into so many groups, which share B and C and are normed apart; a divisor of n_heads.
        chunk_size: steps of time that the scan takes at once; None for what suits the machine. The result does not
            depend on it beyond rounding.
        norm_before_gate: norm(y) · silu(z) instead of norm(y · silu(z)).
        norm_eps: added to the mean square in that norm.
        dt_limit: `(low, high)`, to which δ is clamped; None for no limit, on one side or both.
        A_init_range: at first exp(A_log) is uniform in it.
        dt_min, dt_max, dt_init_floor: at first softplus(dt_bias) is log-uniform between the first two, and no less than
            the third.
        conv_bias: whether the convolution has a bias.
        bias: whether in_proj and out have biases.

    Raises:
        TypeError: a size that is no integer.
        ValueError: sizes that are not positive or do not divide each other, ranges that are none, a negative
            `norm_eps`.

    The state is `MambaState`: d_inner · d_state + (d_conv - 1) · (d_inner + 2·n_groups·d_state) numbers a sequence, for
    any number of tokens.

    Cost: per token 6·expand·d_model² operations in the projections and, with chunks of Q steps, about
    d_inner · (4·d_state + 2·Q) in the scan; time and memory linear in T, except for `matrix`.

    Source: Dao and Gu, Transformers are SSMs (arXiv 2405.21060, §7 and Figure 6, right), with the parameters of
    state-spaces/mamba. Here a model begins with `out` at zero.

    >>> mixer = Mamba2(16, d_state=8, head_dim=4)
    >>> x = torch.randn(2, 10, 16)
    >>> y = mixer(x)
    >>> head, state = mixer(x[:, :9], mixer.initial_state(batch=2))
    >>> last, state = mixer.step(x[:, 9], state)
    >>> torch.allclose(last, y[:, 9], atol=1e-5), tuple(state.ssm.shape)
    (True, (2, 8, 4, 8))
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        n_groups: int = 1,
        chunk_size: int | None = None,
        norm_before_gate: bool = False,
        norm_eps: float = 1e-5,
        dt_limit: Sequence[float | None] | None = None,
        A_init_range: Sequence[float] = (1.0, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(
            d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand, head_dim=head_dim, n_groups=n_groups,
            chunk_size=1 if chunk_size is None else chunk_size,
        )  # fmt: skip
        d_inner = expand * d_model
        if d_inner % head_dim:
            raise ValueError(f"head_dim must divide expand · d_model = {d_inner}, got {head_dim}")
        n_heads = d_inner // head_dim
        if n_heads % n_groups:
            raise ValueError(f"n_groups must divide the {n_heads} heads, got {n_groups}")
        if not 0 <= norm_eps < math.inf:
            raise ValueError(f"norm_eps must be finite and not negative, got {norm_eps}")
        if len(A_init_range) != 2 or not 0 < A_init_range[0] <= A_init_range[1] < math.inf:
            raise ValueError(f"A_init_range must be positive and ascending, got {A_init_range}")
        self.d_model, self.n_heads, self.head_dim = d_model, n_heads, head_dim
        self.n_groups, self.d_state, self.dt_limit = n_groups, d_state, _limits(dt_limit)
        self.state_shape = (n_heads, head_dim, d_state)
        self.scan, self.scan_step, self.scan_matrix = partial(ssd, chunk_size=chunk_size), ssd_step, ssd_matrix
        self._conv_sizes = [d_inner, n_groups * d_state, n_groups * d_state]
        self._sizes = [d_inner, sum(self._conv_sizes), n_heads]
        self.in_proj = Linear(d_model, sum(self._sizes), bias=bias)
        self.conv = CausalConv1d(sum(self._conv_sizes), d_conv, bias=conv_bias, activation="silu")
        self.dt_bias = nn.Parameter(initial_dt_bias(n_heads, dt_min, dt_max, dt_init_floor))
        self.A_log = nn.Parameter(torch.empty(n_heads).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(n_heads))
        self.norm = RMSNormGated(d_inner, n_groups=n_groups, norm_before_gate=norm_before_gate, eps=norm_eps)
        self.out = Linear(d_inner, d_model, bias=bias)

    def _step_options(self) -> dict[str, Any]:
        return {**super()._step_options(), "dt_limit": self.dt_limit}

    def _project(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        z, inputs, dt = self.in_proj(x).split_with_sizes(self._sizes, -1)
        return inputs, (z, dt)

    def _select(self, inputs: Tensor, past: tuple[Tensor, ...]) -> Selected:
        u, B, C = inputs.split_with_sizes(self._conv_sizes, -1)
        z, dt = past
        shape = inputs.shape[:-1]
        heads, groups = (*shape, self.n_heads, self.head_dim), (*shape, self.n_groups, self.d_state)
        # A gate before the norm is the scan's own, which rounds once for both.
        gate = None if self.norm.norm_before_gate else z.view(heads)
        return Selected(u.view(heads), dt, self._rates(), B.view(groups), C.view(groups), gate)

    def _close(self, y: Tensor, past: tuple[Tensor, ...]) -> Tensor:
        z = past[0] if self.norm.norm_before_gate else None
        return cast(Tensor, self.out(self.norm(y.flatten(-2), z)))


def _limits(dt_limit: Sequence[float | None] | None) -> tuple[float, float] | None:
    if dt_limit is None:
        return None
    if len(dt_limit) != 2:
        raise ValueError(f"dt_limit must be (low, high), each None or a number, got {dt_limit!r}")
    low, high = dt_limit
    low, high = 0.0 if low is None else low, math.inf if high is None else high
    if not 0 <= low <= high or low == math.inf:
        raise ValueError(f"dt_limit must be (low, high) with 0 ≤ low ≤ high, got {dt_limit!r}")
    return (low, high)
