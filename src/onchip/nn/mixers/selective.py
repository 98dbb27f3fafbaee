"""What Mamba and Mamba-2 have in common: a short convolution, and after it a recurrence that the input itself sets."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onchip.nn.conv import CausalConv1d
from onchip.nn.mixers.base import Mixer, State
from onchip.ops._sequence import STATE_DTYPES


@dataclass(frozen=True, eq=False)
class MambaState(State):
    """The last inputs of the convolution, `conv (B, d_conv - 1, channels)`, and the recurrence's state `ssm`.

    `ssm` is `(B, d_inner, d_state)` in Mamba and `(B, n_heads, head_dim, d_state)` in Mamba-2, in float32 (float64 for
    float64 models). The size is the same after any number of tokens. A step writes the next state elsewhere, unless
    this one is expendable.
    """

    conv: Tensor
    ssm: Tensor
    overwrite: bool = False

    def expendable(self) -> Self:
        """The same state, and so those that follow it: a step without gradients writes the next in its place."""
        return replace(self, overwrite=True)

    @property
    def may_be_overwritten(self) -> bool:
        """Whether a step may write in its place here and now."""
        in_mode = torch.is_inference_mode_enabled() or not self.ssm.is_inference()
        return self.overwrite and in_mode and not torch.is_grad_enabled()


class Selected(NamedTuple):
    """What the recurrence takes, along time or of one token, in the order of its operation, and its gate."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None


class Selective(Mixer[MambaState]):
    """Project, convolve, scan, project back; a subclass says which projections and which scan.

    Its `_project`, `_select` and `_close` are written for any dimensions before the last, so that they serve a batch,
    packed sequences and one token alike.
    """

    causal = True
    state_type = MambaState
    undecayed = ("A_log",)
    conv: CausalConv1d
    A_log: nn.Parameter
    D: nn.Parameter
    dt_bias: nn.Parameter
    scan: Callable[..., Any]
    scan_step: Callable[..., Any]
    scan_matrix: Callable[..., Any]
    state_shape: tuple[int, ...]
    """Of the recurrence's state, without the batch."""

    @abstractmethod
    def _project(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`(…, d_model)` to the convolution's inputs, and to what goes past it."""

    @abstractmethod
    def _select(self, inputs: Tensor, past: tuple[Tensor, ...]) -> Selected:
        """What the recurrence takes, from what the convolution gave and what went past it."""

    @abstractmethod
    def _close(self, y: Tensor, past: tuple[Tensor, ...]) -> Tensor:
        """`(…, d_model)` from what the recurrence gave."""

    def _step_options(self) -> dict[str, Any]:
        """How dt becomes a step of time."""
        return {"dt_bias": self.dt_bias, "dt_softplus": True}

    def initial_state(self, batch: int) -> MambaState:
        """The state of `batch` sequences before their first token."""
        channels, width = self.conv.weight.shape
        conv = self.conv.weight.new_zeros(batch, width - 1, channels)
        return MambaState(conv, conv.new_zeros(batch, *self.state_shape, dtype=STATE_DTYPES[conv.dtype]))

    def _step(self, x_t: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        overwrite = state.may_be_overwritten
        inputs, past = self._project(x_t)
        inputs, conv = self.conv.step(inputs, state.conv, overwrite=overwrite)
        x, *others, z = self._select(inputs, past)
        y, ssm = self.scan_step(
            x, state.ssm, *others, D=self.D, z=z, out_state=state.ssm if overwrite else None, **self._step_options()
        )
        return self._close(y, past), MambaState(conv, ssm, state.overwrite)

    def matrix(self, x: Tensor) -> Tensor:
        """The semiseparable matrix of the recurrence, of which `apply_matrix` tells the surroundings."""
        _, dt, A, B, C, _ = self._selected(x)[0]
        M: Tensor = self.scan_matrix(dt, A, B, C, **self._step_options())
        return M

    def apply_matrix(self, x: Tensor, matrix: Tensor) -> Tensor:
        """`mixer(x)` with `matrix` in place of the recurrence, after the convolution and before D, gate and norm."""
        (u, *_, z), past = self._selected(x)
        y = torch.einsum("bhij,bjh...->bih...", matrix.to(u.dtype), u)
        y = y + u * self.D.to(u.dtype).view(-1, *[1] * (u.ndim - 3))
        return self._close(y if z is None else y * F.silu(z), past)

    def _parallel(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        (*operands, z), past = self._selected(x, cu_seqlens)
        return self._close(self.scan(*operands, D=self.D, z=z, cu_seqlens=cu_seqlens, **self._step_options()), past)

    def _chunk(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        inputs, past = self._project(x)
        inputs, conv = self.conv(inputs, state.conv)
        *operands, z = self._select(inputs, past)
        y, ssm = self.scan(
            *operands, D=self.D, z=z, initial_state=state.ssm, return_final_state=True, **self._step_options()
        )
        return self._close(y, past), MambaState(conv, ssm, state.overwrite)

    def _selected(self, x: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Selected, tuple[Tensor, ...]]:
        inputs, past = self._project(x)
        return self._select(self.conv(inputs, cu_seqlens=cu_seqlens), past), past

    def _rates(self) -> Tensor:
        """A, which is negative: every state decays."""
        logarithms = self.A_log
        return -logarithms.to(STATE_DTYPES[logarithms.dtype]).exp()


def initial_dt_bias(n: int, dt_min: float, dt_max: float, floor: float) -> Tensor:
    """`(n,)`: softplus of it is log-uniform from `dt_min` to `dt_max`, and at least `floor`.

    Raises:
        ValueError: not 0 < dt_min ≤ dt_max, or a floor that is not positive.
    """
    if not 0 < dt_min <= dt_max < math.inf:
        raise ValueError(f"dt_min and dt_max must be positive and ascending, got {dt_min} and {dt_max}")
    if not floor > 0:
        raise ValueError(f"dt_init_floor must be positive, got {floor}")
    dt = torch.empty(n).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))
