"""Triton: whether it is there, which devices it serves, and a kernel's launch as a value.

Nothing here imports Triton. A `Launch` can be run on a GPU, run on a CPU by Triton's interpreter (TRITON_INTERPRET=1,
set before the first call), or compiled ahead of time for a GPU that is not there (`onchip.testing.ahead_of_time`).
"""

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

DEVICES = ("cuda",)

missing: str | None = None if find_spec("triton") else "Triton is not installed; pip install 'onchip[triton]' brings it"


def interpreted_on() -> tuple[str, ...]:
    """The devices on which kernels run by interpretation, thousands of times slower: for tests and debugging."""
    return ("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else ()


def limits(device: torch.device) -> str | None:
    """Why kernels in Triton cannot run on this device, or None."""
    if missing is not None:
        return missing
    if device.type == "cpu" and _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        return f"the interpreter of Triton {version('triton')} needs NumPy before 2.4, and it is {version('numpy')}"
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    if torch.version.hip:
        if architecture(device).startswith("gfx9"):
            return None
        return f"of AMD's GPUs it serves gfx9, and the {torch.cuda.get_device_name(device)} is {architecture(device)}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        return f"it needs compute capability 8.0 (Ampere) or newer, and the {name} has {major}.{minor}"
    return None


def _release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


@functools.cache
def architecture(device: torch.device) -> str:
    """The device's name in tables of block shapes: "sm_90", "gfx942", "interpreter"."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def on_device_of(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Launches inside run on the GPU that holds `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


class Launch(NamedTuple):
    """A kernel with its grid and arguments, constexprs among them, in the order of its parameters."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    warps: int = 4
    stages: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """What the kernel is compiled with. Products and sums fuse: Triton warns that its own default will change."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Launch it on the current device; a grid of nothing is nothing to do."""
        if min(self.grid) > 0:
            self.kernel[self.grid](*self.arguments, **self.options)
