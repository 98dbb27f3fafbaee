"""Incoherent processing: random signs and a Hadamard matrix spread an outlier over the head dim, and q·k stays."""

import functools

import torch
from torch import Tensor

from onchip.ops.hadamard import hadamard


def rotate(x: Tensor, seed: int) -> Tensor:
    """`x` in float32 times the seed's signs and the orthogonal Hadamard matrix, padded to a power of two with zeros."""
    dim = x.shape[-1]
    size = 1 << (dim - 1).bit_length()
    padded = torch.nn.functional.pad(x.float(), (0, size - dim))
    return hadamard(padded, signs(seed, size, x.device))


@functools.lru_cache(maxsize=64)
def signs(seed: int, size: int, device: torch.device) -> Tensor:
    """`size` random signs, the same on every device."""
    draws = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed))
    return (2 * draws - 1).float().to(device)
