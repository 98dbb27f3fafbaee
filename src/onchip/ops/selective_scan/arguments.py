"""The selective scan's arguments as its op's kernels take them, and the results they allocate."""

from typing import NamedTuple

import torch
from torch import Tensor

from onchip.ops._sequence import STATE_DTYPES

CHUNK = 32  # tokens between two states that the backward pass finds saved


class Call(NamedTuple):
    """The op's tensors and `dt_softplus`, in the order of its schema; x and what is as x may be packed."""

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

    @property
    def sequences(self) -> int:
        """How many there are, each with a state."""
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def wide(self) -> torch.dtype:
        """The type of the arithmetic and of the state."""
        return STATE_DTYPES[self.x.dtype]

    def results(self, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The output, the final state, and the states before every chunk, `(rows, N, D)`: no rows unless to `save`.

        There are rows enough for any lengths of packed sequences: one that begins with token t of all may have its own
        from t // CHUNK + its number on. What remains is zero.
        """
        channels, states = self.A.shape
        rows = 0
        if save and self.cu_seqlens is None:
            rows = self.sequences * -(-self.x.shape[1] // CHUNK)
        elif save:
            rows = self.x.shape[0] // CHUNK + self.sequences
        make = self.x.new_empty if self.cu_seqlens is None else self.x.new_zeros
        return (
            self.x.new_empty(self.x.shape),
            self.x.new_empty(self.sequences, channels, states, dtype=self.wide),
            make((rows, states, channels), dtype=self.wide),
        )

    def gradients(self) -> tuple[Tensor, ...]:
        """Of x, dt, A, B, C, D, z, dt_bias and initial_state; without elements for what is absent."""
        return tuple(self.x.new_empty(0) if u is None else u.new_empty(u.shape) for u in self[:9])
