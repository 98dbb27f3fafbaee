"""What a count, a size or a length may be."""

import torch


def check_count(name: str, n: int, least: int = 0) -> None:
    """`n` is an integer, of at least `least`."""
    if isinstance(n, bool) or not isinstance(n, int | torch.SymInt):
        raise TypeError(f"{name} must be an integer, got {type(n).__name__}")
    if n < least:
        raise ValueError(f"{name} must be at least {least}, got {n}")


def check_sizes(**sizes: int) -> None:
    """Each is an integer of at least 1."""
    for name, size in sizes.items():
        check_count(name, size, least=1)
