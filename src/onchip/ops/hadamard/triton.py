"""The Walsh–Hadamard transform in Triton: a program transforms a tile of rows in registers.

A stage splits the elements by the lowest bit of their index, takes sums and differences, and puts that bit on top:
after log2(n) of the same stage every bit has had its turn and is back in its place.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from onchip.ops._triton import Launch, on_device_of
from onchip.ops.hadamard.rows import in_four_dimensions

_TILE = 1024  # elements of a program, where a row has no more: 8 registers of a thread of four warps


class Rows(NamedTuple):
    """x as the kernel sees it: `(a, b, c, n)` with rows numbered through its first three dimensions."""

    ptr: Any
    b: int
    c: int
    stride_a: int
    stride_b: int
    stride_c: int
    stride_n: int


@triton.jit
def _transform(x, before, after, out, rows, scale, N: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, N)[None, :]
    start = (row // x.c // x.b) * x.stride_a + (row // x.c % x.b) * x.stride_b + (row % x.c) * x.stride_c
    y = tl.load(x.ptr + start + column.to(tl.int64) * x.stride_n, mask=row < rows, other=0).to(tl.float32)
    if before is not None:
        y *= tl.load(before + column)
    for _ in tl.static_range(BITS):
        a, b = tl.split(y.reshape(ROWS, N // 2, 2))
        y = tl.join(a + b, a - b).permute(0, 2, 1).reshape(ROWS, N)
    y *= scale
    if after is not None:
        y *= tl.load(after + column)
    tl.store(out + row * N + column, y.to(out.dtype.element_ty), mask=row < rows)


def launch(x: Tensor, before: Tensor | None, after: Tensor | None, scale: float, out: Tensor) -> Launch:
    """The kernel's launch; `before` and `after` are contiguous float32, and `out` is contiguous."""
    n = x.shape[-1]
    rows = x.numel() // n
    tile = max(_TILE // n, 1)
    x = in_four_dimensions(x)
    described = Rows(x, x.shape[1], x.shape[2], *x.stride())
    arguments = (described, before, after, out, rows, scale, n, n.bit_length() - 1, tile)
    return Launch(_transform, (triton.cdiv(rows, tile),), arguments)


def transform(x: Tensor, before: Tensor | None, after: Tensor | None, scale: float) -> Tensor:
    """The op on a GPU."""
    out = x.new_empty(x.shape)
    before, after = (None if f is None else f.to(torch.float32).contiguous() for f in (before, after))
    with on_device_of(x):
        launch(x, before, after, scale, out).run()
    return out
