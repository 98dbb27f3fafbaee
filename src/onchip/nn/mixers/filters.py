"""What HiPPO, LSSL, S4 and S4D have in common: d_model channels, each filtered in time by itself, then mixed."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onchip.nn.linear import Linear
from onchip.nn.mixers.base import Mixer, S, State
from onchip.nn.state_space import System, causal_convolution
from onchip.ops._count import check_sizes
from onchip.ops._sequence import STATE_DTYPES, sequences


class Filters(Mixer[S]):
    """y = out(gelu(filters(x) + D·x)), with a causal linear filter for each of d_model channels.

    `D (d_model,)` starts standard normal, as published; the activation and the projection are those of S4's layer,
    without its gate.
    """

    causal = True

    def __init__(self, d_model: int) -> None:
        super().__init__()
        check_sizes(d_model=d_model)
        self.d_model = d_model
        self.D = nn.Parameter(torch.randn(d_model))
        self.out = Linear(d_model, d_model, bias=False)

    def apply_matrix(self, x: Tensor, matrix: Tensor) -> Tensor:
        """`mixer(x)` with `matrix (B, d_model, T, T)` in place of the filters."""
        u = self._channels(x)
        return self._outputs((matrix.to(u.dtype) @ u[..., None])[..., 0], u, x)

    def _channels(self, x: Tensor) -> Tensor:
        """`x (..., T, d_model)` as `(..., d_model, T)` in the dtype of the filters."""
        return x.mT.to(self._dtype)

    def _outputs(self, y: Tensor, u: Tensor, x: Tensor) -> Tensor:
        """What the filters' results `y (..., d_model, T)` for the channels `u` of `x` become."""
        return self._output((y + self.D[:, None] * u).mT, x)

    def _output(self, y: Tensor, x: Tensor) -> Tensor:
        return cast(Tensor, self.out(F.gelu(y).to(x.dtype)))

    @property
    def _dtype(self) -> torch.dtype:
        return STATE_DTYPES[self.D.dtype]

    def _exactly(self) -> AbstractContextManager[object]:
        """Autocast has no say in the filters: they sum over all of the sequence."""
        return torch.autocast(self.D.device.type, enabled=False)


@dataclass(frozen=True, eq=False)
class FilterState(State):
    """The states of the channels' systems, `x (B, d_model, N)`: float32 (float64 for float64), or as complex."""

    x: Tensor


class TimeInvariantFilters(Filters[FilterState]):
    """Filters whose systems do not change with time: convolutions in parallel, recurrences in steps.

    A family gives its parameters and `_discretize`. While no gradients are recorded, steps keep what that computes: it
    is made again when a parameter or buffer is another tensor or was written to, and by every other form and each
    `initial_state`. (PyTorch keeps no count of what is written through `.data`, nor of fused optimizers' steps: only
    decoding that goes on across such a write would not see it.)
    """

    state_type = FilterState

    def __init__(self, d_model: int, state_size: int, is_complex: bool, dt_min: float, dt_max: float) -> None:
        super().__init__(d_model)
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min and dt_max must be positive and in order, got {dt_min} and {dt_max}")
        self._state_size, self._is_complex = state_size, is_complex
        self.log_dt = nn.Parameter(torch.empty(d_model).uniform_(math.log(dt_min), math.log(dt_max)))
        self._kept: tuple[list[tuple[Tensor, Tensor, int]], System] | None = None

    @abstractmethod
    def _discretize(self) -> System:
        """The channels' systems in discrete time, in `_dtype`."""

    def initial_state(self, batch: int) -> FilterState:
        """The state of `batch` sequences before their first token."""
        self._kept = None
        shape = (batch, self.d_model, self._state_size)
        return FilterState(torch.zeros(shape, dtype=self._state_dtype, device=self.D.device))

    def _step(self, x_t: Tensor, state: FilterState) -> tuple[Tensor, FilterState]:
        self._check_state(x_t, state)
        with self._exactly():
            u = x_t.to(self._dtype)
            y, x = self._kept_system().step(u, state.x)
            y = y + self.D * u
        return self._output(y, x_t), FilterState(x)

    def matrix(self, x: Tensor) -> Tensor:
        """The channels' Toeplitz matrices `(B, d_model, T, T)`, without D; memory quadratic in T."""
        T = x.shape[1]
        with self._exactly():
            k = F.pad(self._system().kernel(T), (T, 0))  # k[l] at l + T: zero for what is yet to come
        time = torch.arange(T, device=x.device)
        return k[:, time[:, None] - time + T].expand(len(x), -1, -1, -1)

    def _parallel(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        u = self._channels(x)
        with self._exactly():
            y = self._convolved(u) if cu_seqlens is None else self._packed(u, x, cu_seqlens)
        return self._outputs(y, u, x)

    def _convolved(self, u: Tensor) -> Tensor:
        return causal_convolution(u, self._system().kernel(u.shape[-1]))

    def _packed(self, u: Tensor, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        rows = sequences(cu_seqlens, len(x))
        k = self._system().kernel(max((r.stop - r.start for r in rows), default=0))
        return torch.cat([u[:, :0], *(causal_convolution(u[:, r], k) for r in rows)], dim=-1)

    def _chunk(self, x: Tensor, state: FilterState) -> tuple[Tensor, FilterState]:
        self._check_state(x, state)
        u = self._channels(x)
        with self._exactly():
            added, last = self._system().advance(u, state.x)
            y = self._convolved(u) + added
        return self._outputs(y, u, x), FilterState(last)

    def _system(self) -> System:
        """The systems of the parameters as they are now."""
        if not torch.compiler.is_compiling():
            self._kept = None
        return self._kept_system()

    def _kept_system(self) -> System:
        if torch.compiler.is_compiling():
            return self._discretize()
        if torch.is_grad_enabled():  # an optimizer's step may come of it
            self._kept = None
            return self._discretize()
        made_of = [x for x in (*self._parameters.values(), *self._buffers.values()) if x is not None]
        if any(tensor.is_inference() for tensor in made_of):  # they count no writes
            return self._discretize()
        if self._kept is None or not _unchanged(self._kept[0], made_of):
            # The alias keeps the storage, so that none other can come to have its address.
            self._kept = [(tensor, tensor.detach(), tensor._version) for tensor in made_of], self._discretize()
        return self._kept[1]

    @property
    def _state_dtype(self) -> torch.dtype:
        return self._dtype.to_complex() if self._is_complex else self._dtype

    def _check_state(self, x: Tensor, state: FilterState) -> None:
        shape, dtype = (len(x), self.d_model, self._state_size), self._state_dtype
        if state.x.shape != shape or state.x.dtype != dtype:
            got = f"{tuple(state.x.shape)} {state.x.dtype}"
            raise ValueError(f"state must be of the input's rows and of this mixer, {shape} {dtype}, got {got}")


def _unchanged(seen: list[tuple[Tensor, Tensor, int]], now: Sequence[Tensor]) -> bool:
    return all(
        tensor is other and alias.data_ptr() == other.data_ptr() and version == other._version
        for (tensor, alias, version), other in zip(seen, now, strict=True)
    )


def as_parameter(x: Tensor, channels: int | None = None) -> nn.Parameter:
    """A parameter of the default dtype and device with the values of `x`, the same for each channel if so many."""
    return nn.Parameter(as_buffer(x if channels is None else x.expand(channels, *x.shape)))


def as_buffer(x: Tensor) -> Tensor:
    """`x` in the default dtype and on the default device; complex numbers as pairs, which `Module.to` can convert."""
    real = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return real.to(torch.get_default_device(), torch.get_default_dtype(), copy=True).contiguous()


def check_state_size(d_state: int, *, even: bool) -> None:
    """`d_state` is an integer, positive, and even where its states come in conjugate pairs."""
    check_sizes(d_state=d_state)
    if even and d_state % 2:
        raise ValueError(f"d_state must be even, got {d_state}")
