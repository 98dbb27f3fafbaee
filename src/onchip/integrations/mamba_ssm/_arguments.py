"""What several of mamba_ssm's functions ask of their arguments."""

from torch import Tensor


def refuse_complex(**tensors: Tensor) -> None:
    """None of them is complex."""
    for name, x in tensors.items():
        if x.is_complex():
            raise TypeError(f"{name} must be real, got {x.dtype}: the complex selective scan is not in onchip")
