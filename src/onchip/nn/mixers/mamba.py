"""Mamba's mixer: a selective state space for every channel."""

import math
from typing import Literal, cast

import torch
from torch import Tensor, nn

from onchip.nn.conv import CausalConv1d
from onchip.nn.linear import Linear
from onchip.nn.mixers.selective import Selected, Selective, initial_dt_bias
from onchip.ops import selective_scan, selective_scan_matrix, selective_scan_step
from onchip.ops._count import check_sizes


class Mamba(Selective):
    r"""Mamba's selective state space: each of d_inner channels has d_state numbers of memory, its input sets the pace.

    For `x (B, T, d_model)` and every channel d of d_inner = expand · d_model:

        u, z     = in_proj(x)
        u        = silu(conv(u))                       a causal convolution of d_conv taps
        dt, B, C = x_proj(u),    δ = softplus(dt_proj(dt) + dt_bias),    A = -exp(A_log)
        h[t]     = exp(δ[t] A) ∘ h[t-1] + δ[t] u[t] B[t]
        y[t]     = out((C[t] · h[t] + D u[t]) · silu(z[t]))

    As a matrix, per channel: M[i, j] = C[i]ᵀ exp(A Σ_{j<k≤i} δ[k]) B[j] δ[j]. Its heads are the channels:
    `matrix` is `(B, d_inner, T, T)`, and what it is applied to is u, after the convolution.

    Args:
        d_model: features in and out.
        d_state: numbers of memory per channel.
        d_conv: taps of the convolution.
        expand: d_inner over d_model.
        dt_rank: features that δ is made from; "auto" for d_model / 16, rounded up.
        dt_min, dt_max, dt_init_floor: at first softplus(dt_bias) is log-uniform between the first two, and no less than
            the third.
        dt_init: dt_proj begins "random", uniform in ±r, or "constant" at r, with r = dt_scale / √dt_rank.
        dt_scale: see there.
        conv_bias: whether the convolution has a bias.
        bias: whether in_proj and out have biases.

    A begins as -1, …, -d_state in each channel, D as 1.

    Raises:
        TypeError: a size that is no integer.
        ValueError: a size that is not positive, a range of dt that is none, an unknown `dt_init`.

    The state is `MambaState`: d_inner · (d_conv - 1 + d_state) numbers a sequence, for any number of tokens.

    Cost: per token 6·expand·d_model² operations in the two large projections and about 10·d_inner·d_state in the scan;
    time and memory linear in T, except for `matrix`.

    Source: Gu and Dao, Mamba (arXiv 2312.00752, §3 and Figure 3), with the parameters of state-spaces/mamba. Here a
    model begins with `out` at zero.

    >>> mixer = Mamba(16)
    >>> x = torch.randn(2, 10, 16)
    >>> y = mixer(x)
    >>> head, state = mixer(x[:, :9], mixer.initial_state(batch=2))
    >>> last, state = mixer.step(x[:, 9], state)
    >>> torch.allclose(last, y[:, 9], atol=1e-5), tuple(state.ssm.shape)
    (True, (2, 32, 16))
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model)
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        check_sizes(d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=rank)
        if dt_init not in ("random", "constant"):
            raise ValueError(f'dt_init must be "random" or "constant", got {dt_init!r}')
        d_inner = expand * d_model
        self.d_model, self.d_state, self.dt_rank = d_model, d_state, rank
        self.state_shape = (d_inner, d_state)
        self.scan, self.scan_step, self.scan_matrix = selective_scan, selective_scan_step, selective_scan_matrix
        self.in_proj = Linear(d_model, 2 * d_inner, bias=bias)
        self.conv = CausalConv1d(d_inner, d_conv, bias=conv_bias, activation="silu")
        self.x_proj = Linear(d_inner, rank + 2 * d_state, bias=False)
        self.dt_proj = Linear(rank, d_inner, bias=False)
        self.dt_bias = nn.Parameter(initial_dt_bias(d_inner, dt_min, dt_max, dt_init_floor))
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out = Linear(d_inner, d_model, bias=bias)
        bound = dt_scale / math.sqrt(rank)
        nn.init.uniform_(self.dt_proj.weight, bound if dt_init == "constant" else -bound, bound)

    def _project(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs, z = self.in_proj(x).chunk(2, dim=-1)
        return inputs, (z,)

    def _select(self, inputs: Tensor, past: tuple[Tensor, ...]) -> Selected:
        dt, B, C = self.x_proj(inputs).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        (z,) = past
        return Selected(inputs, self.dt_proj(dt), self._rates(), B.unsqueeze(-2), C.unsqueeze(-2), z)

    def _close(self, y: Tensor, past: tuple[Tensor, ...]) -> Tensor:
        return cast(Tensor, self.out(y))
