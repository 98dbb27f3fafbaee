"""What the kernels are given: tensors as pointers with strides, and where chunks of time begin and end.

An absent tensor is a pointer of None: Triton 3.6 cannot compare a tuple with None.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from onchip.ops._sequence import boundaries


class Rows(NamedTuple):
    """A tensor of up to four dimensions: (batch, time, head or group, dim), or a state (sequence, head, dim, state)."""

    ptr: Any
    a: int
    b: int
    c: int
    d: int


def rows(x: Tensor | None, *, packed: bool = False) -> Rows:
    """`x` with its strides, 0 for the dimensions that it has not; a `packed` one is a batch of one."""
    if x is None:
        return Rows(None, 0, 0, 0, 0)
    strides = (0, *x.stride()) if packed else x.stride()
    return Rows(x, *strides, *(0,) * (4 - len(strides)))


class Steps(NamedTuple):
    """What becomes steps and decays: dt and its strides, the rates, the bias, and the range of a step."""

    dt: Any
    batch: int
    time: int
    head: int
    A: Any
    bias: Any
    low: float
    high: float


class Chunks(NamedTuple):
    """Chunks of time: in a `table` of their starts and ends where sequences are packed, and else every `size` steps.

    `firsts` are the numbers of the sequences' first chunks, and of one past the last.
    """

    table: Any
    firsts: Any
    time: int
    per_sequence: int


def divide(x: Tensor, cu_seqlens: Tensor | None, size: int) -> tuple[Chunks, int]:
    """The chunks of a call, and how many they are."""
    if cu_seqlens is None:
        per_sequence = triton.cdiv(x.shape[1], size)
        return Chunks(None, None, x.shape[1], per_sequence), x.shape[0] * per_sequence
    table, firsts = [], [0]
    for begin, end in pairwise(boundaries(cu_seqlens, x.shape[0])):
        table += [(start, min(start + size, end)) for start in range(begin, end, size)]
        firsts.append(len(table))
    on_device = [torch.tensor(values, dtype=torch.int64).to(x.device) for values in (table, firsts)]
    return Chunks(on_device[0], on_device[1], x.shape[0], 0), len(table)
