"""Rows that hold several sequences, told apart by a number per token (`seq_idx`), as packed sequences."""

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where sequences begin among the tokens of all rows, and which are the first and the last of each row."""

    cu_seqlens: Tensor
    first: Tensor
    last: Tensor

    def initial_states(self, states: Tensor | None) -> Tensor | None:
        """A state for each sequence: the row's for its first one, zeros for the others."""
        if states is None:
            return None
        return states.new_zeros(len(self.cu_seqlens) - 1, *states.shape[1:]).index_copy(0, self.first, states)


def packing(seq_idx: Tensor, rows: int, length: int) -> Packing:
    """How `seq_idx (rows, length)` divides the tokens; reads the number of sequences from the device.

    Raises:
        ValueError, TypeError: `seq_idx` is not of that shape, or not of integers.

    >>> packing(torch.tensor([[0, 0, 1], [4, 4, 4]]), 2, 3)
    Packing(cu_seqlens=tensor([0, 2, 3, 6]), first=tensor([0, 2]), last=tensor([1, 2]))
    """
    if not isinstance(seq_idx, Tensor) or seq_idx.dtype not in (torch.int32, torch.int64):
        got = getattr(seq_idx, "dtype", type(seq_idx).__name__)
        raise TypeError(f"seq_idx must be an int32 or int64 tensor, got {got}")
    if seq_idx.shape != (rows, length):
        raise ValueError(f"seq_idx must have shape ({rows}, {length}), got {tuple(seq_idx.shape)}")
    if length == 0:  # each row is one sequence, and empty
        row = torch.arange(rows, device=seq_idx.device)
        return Packing(row.new_zeros(rows + 1), row, row)
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx.diff(dim=1) != 0
    starts = begins.flatten().nonzero()[:, 0]
    first = torch.searchsorted(starts, torch.arange(rows, device=starts.device) * length)
    last = torch.cat([first[1:], first.new_full((min(rows, 1),), len(starts))]) - 1
    return Packing(torch.cat([starts, starts.new_full((1,), rows * length)]), first, last)
