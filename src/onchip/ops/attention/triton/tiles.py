"""Tiles in and out of memory. Offsets of rows are in 64 bits: a long sequence of many heads passes 2³¹ elements."""

import triton
import triton.language as tl


@triton.jit
def offsets(x, b, time, head):
    """Where rows of `x` begin; any of b, time and head may be a vector."""
    return b.to(tl.int64) * x.batch + time.to(tl.int64) * x.time + head.to(tl.int64) * x.head


@triton.jit
def load(x, start, inside, DIM: tl.constexpr, WIDTH: tl.constexpr, CHECKED: tl.constexpr):
    """A (rows, WIDTH) tile of rows of DIM elements at the offsets `start`; zero beyond DIM.

    CHECKED: also zero, and not read, where `inside` is False.
    """
    d = tl.arange(0, WIDTH)
    pointers = x.ptr + start[:, None] + d[None, :]
    if DIM == WIDTH:
        if CHECKED:
            return tl.load(pointers, mask=inside[:, None], other=0.0)
        else:
            return tl.load(pointers)
    else:
        if CHECKED:
            return tl.load(pointers, mask=inside[:, None] & (d < DIM)[None, :], other=0.0)
        else:
            return tl.load(pointers, mask=(d < DIM)[None, :], other=0.0)


@triton.jit
def store(x, start, inside, tile, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The first DIM columns of a tile to the rows at the offsets `start` where `inside`."""
    d = tl.arange(0, WIDTH)
    mask = inside[:, None] & (d < DIM)[None, :]
    tl.store(x.ptr + start[:, None] + d[None, :], tile.to(x.ptr.dtype.element_ty), mask=mask)
