"""What several of mamba_ssm's functions ask of their arguments."""

from torch import Tensor


def check_are_tensors(**tensors: Tensor) -> None:
    """Each is a tensor with dimensions, whose sizes may be looked at."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim == 0:
            raise ValueError(f"{name} must have dimensions, got shape ()")


def refuse_complex(**tensors: Tensor) -> None:
    """None of them is complex."""
    for name, x in tensors.items():
        if x.is_complex():
            raise TypeError(f"{name} must be real, got {x.dtype}: the complex selective scan is not in onchip")
