"""A call to the op as its implementations see it, and what they write their results into."""

from typing import NamedTuple

import torch
from torch import Tensor

from onchip.ops._sequence import STATE_DTYPES


class Call(NamedTuple):
    """The op's arguments, in the schema's order."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    dt_softplus: bool
    dt_low: float
    dt_high: float
    chunk_size: int | None

    @property
    def dtype(self) -> torch.dtype:
        """The type of the arithmetic."""
        return STATE_DTYPES[self.x.dtype]

    @property
    def states(self) -> tuple[int, int, int, int]:
        """The shape of the states."""
        count = self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        return count, self.x.shape[-2], self.x.shape[-1], self.B.shape[-1]

    def results(self) -> tuple[Tensor, Tensor]:
        """Uninitialised `out` and `final_state`."""
        return self.x.new_empty(self.x.shape), self.x.new_empty(self.states, dtype=self.dtype)

    def gradients(self) -> tuple[Tensor, ...]:
        """Uninitialised gradients, contiguous; an absent input's has no elements."""
        inputs = (self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.dt_bias, self.initial_state)
        return tuple(self.x.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)
