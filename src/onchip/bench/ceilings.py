"""What a call is held against, timed in the same rounds: a product of matrices, or memory read or copied."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from onchip.bench.timing import Candidate, interleave, quartiles, ratio

GIGABYTE = 2**30


@dataclass(frozen=True)
class Ceiling:
    """`work` is the operations of one call, or the bytes that it reads, or reads and writes."""

    name: Literal["mm", "read", "copy"]
    work: float
    candidate: Candidate

    def rates(self, amount: float, times: Mapping[str, list[float]]) -> dict[str, float]:
        """Of each candidate, `amount` being its work, and of the ceiling itself: TFLOP/s or GB/s."""
        unit = 1e12 if self.name == "mm" else 1e9
        work = {name: self.work if name == self.name else amount for name in times}
        return {name: significant(work[name] / unit / quartiles(values).median) for name, values in times.items()}

    def fraction(self, amount: float, times: Mapping[str, list[float]]) -> dict[str, float]:
        """Of each candidate, how much of the ceiling's rate it reaches."""
        work = amount / self.work
        return {
            name: significant(work * ratio(times[self.name], values).median)
            for name, values in times.items()
            if name != self.name
        }


def products(dtype: str, device: torch.device) -> Ceiling:
    """A product of square matrices, which takes long enough to be at full speed."""
    size, largest = (256, 4096) if device.type == "cpu" else (8192, 8192)
    while True:
        operand = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        product = Candidate(functools.partial(torch.mm, operand, operand))
        if size == largest or interleave({"mm": product}, device, seconds=0.0, min_rounds=1)["mm"][0] > 5e-3:
            return Ceiling("mm", 2.0 * size**3, product)
        size *= 2


def reading(nbytes: int, device: torch.device) -> Ceiling:
    """That much memory read."""
    whole = torch.ones(nbytes // 4, device=device)
    return Ceiling("read", whole.nbytes, Candidate(whole.sum))


def copying(nbytes: int, device: torch.device) -> Ceiling:
    """Half of that much memory read, and half of it written."""
    source, target = (torch.ones(nbytes // 8, device=device) for _ in range(2))
    return Ceiling("copy", 2 * source.nbytes, Candidate(functools.partial(target.copy_, source)))


def significant(value: float) -> float:
    """The value as it is kept.

    >>> significant(0.123456)
    0.1235
    """
    return float(f"{value:.4g}")
