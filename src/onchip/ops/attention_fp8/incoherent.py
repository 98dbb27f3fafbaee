"""Incoherent processing: random signs and a Hadamard matrix spread an outlier over the head dim, and q·k stays."""

import torch
from torch import Tensor

from onchip.ops.hadamard import Backend, hadamard

_32_BITS = (1 << 32) - 1


def rotate(x: Tensor, seed: int, backend: Backend | None = None) -> Tensor:
    """`x` in float32 times the seed's signs and the orthogonal Hadamard matrix, padded to a power of two with zeros."""
    dim = x.shape[-1]
    size = 1 << (dim - 1).bit_length()
    padded = torch.nn.functional.pad(x.float(), (0, size - dim))
    return hadamard(padded, signs(seed, size, x.device), backend=backend)


def signs(seed: int, size: int, device: torch.device) -> Tensor:
    """`size` random signs, the same on every device: the lowest bits of MurmurHash3's mix of a counter.

    Computed where they are used: nothing is copied to a GPU, so that a CUDA graph can capture it.
    """
    bits = torch.arange(size, device=device) + ((seed ^ seed >> 32) * 0x9E3779B9 & _32_BITS)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = ((bits ^ bits >> shift) & _32_BITS) * factor & _32_BITS
    return (1 - 2 * ((bits ^ bits >> 16) & 1)).float()
