"""Rounding to e4m3 with one scale per block of rows: what the implementations of FP8 attention multiply."""

from typing import NamedTuple

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3; the next number up would be NaN
SMALLEST_SCALE = 2.0**-126  # float32's smallest normal number: a block of zeros, or next to it, is not divided by zero

# Queries, and keys, that share a scale. The tile that FlashAttention-3's kernel gives a group of warps, and a constant:
# the rounding of the probabilities depends on it, and every implementation is to round alike.
BLOCK = 128


class Quantized(NamedTuple):
    """A tensor in e4m3, `(…, heads, dim)`, and the float32 factor of each of its rows, `(…, heads)`; contiguous."""

    values: Tensor
    scales: Tensor


class Blocks(NamedTuple):
    """Which block each row is in, `(rows,)`, and a bound on their number."""

    of_row: Tensor
    bound: int


def blocks(x: Tensor, cu_seqlens: Tensor | None, block_scales: bool) -> Blocks:
    """The blocks of a `(B, T, H, D)` or packed `(total, H, D)` tensor: of BLOCK rows, or whole sequences.

    Blocks start where sequences do. Nothing here waits for the boundaries' values to come from the device.
    """
    if cu_seqlens is None:
        batch, time = x.shape[:2]
        each = -(-time // BLOCK) if block_scales else 1
        row = torch.arange(time, device=x.device) // BLOCK if block_scales else x.new_zeros(time, dtype=torch.int64)
        start = torch.arange(batch, device=x.device)[:, None] * each
        return Blocks((start + row).flatten(), batch * each)
    row = torch.arange(x.shape[0], device=x.device)
    sequence = torch.bucketize(row, cu_seqlens[1:], right=True)
    if not block_scales:
        return Blocks(sequence, cu_seqlens.shape[0])
    start = cu_seqlens[sequence]
    # The blocks of sequence b are numbered from start // BLOCK + b, which is past the last of sequence b - 1.
    return Blocks(start // BLOCK + sequence + (row - start) // BLOCK, x.shape[0] // BLOCK + cu_seqlens.shape[0])


def quantize(x: Tensor, within: Blocks) -> Quantized:
    """`x` as e4m3 times a scale per block and head: the largest magnitude there becomes e4m3's largest.

    Rounds to nearest, ties to even. An infinity or a NaN turns its block's numbers into NaN.
    """
    x = x.float().contiguous()
    peaks = x.abs().amax(-1).flatten(0, -2)  # (rows, heads)
    index = within.of_row[:, None].expand_as(peaks)
    block_peaks = peaks.new_zeros(within.bound, peaks.shape[1]).scatter_reduce_(0, index, peaks, "amax")
    scales = (block_peaks / LARGEST).clamp_min(SMALLEST_SCALE)[within.of_row].view(x.shape[:-1])
    return Quantized((x / scales[..., None]).to(E4M3), scales)
