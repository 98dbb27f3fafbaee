"""The implementations of the causal convolution that are held to its definition."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import onchip
from onchip.ops import _native, _triton

ON_GPU = torch.cuda.is_available()
ALL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Target(NamedTuple):
    """An implementation, its instruction set where it has some, and what it serves."""

    backend: str
    instruction_set: str | None
    dtypes: tuple[torch.dtype, ...]

    def __call__(self, function: Any, *tensors: Tensor | None, **more: Any) -> Any:
        """One of onchip's functions by this implementation; Triton's on a GPU where there is one, else interpreted."""
        device = "cuda" if ON_GPU and self.backend == "triton" else "cpu"
        move = lambda t: t.to(device) if isinstance(t, Tensor) else t  # noqa: E731
        result = function(*map(move, tensors), backend=self.backend, **{name: move(t) for name, t in more.items()})
        return result.cpu() if isinstance(result, Tensor) else tuple(t.cpu() for t in result)

    def conv(self, *tensors: Tensor | None, **more: Any) -> Any:
        """`onchip.causal_conv1d`."""
        return self(onchip.causal_conv1d, *tensors, **more)

    def step(self, *tensors: Tensor | None, **more: Any) -> Any:
        """`onchip.causal_conv1d_step`."""
        return self(onchip.causal_conv1d_step, *tensors, **more)


REFERENCE = pytest.param(Target("reference", None, ALL), id="reference")
NATIVE = [] if _native.missing else _native.kernels.instruction_sets()
CPU = [pytest.param(Target("cpu", name, ALL), id=f"cpu-{name}") for name in NATIVE]

# Interpreted, bfloat16 is rounded by cutting off.
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if ON_GPU else (torch.float32, torch.float16)
ABSENT = _triton.missing or (
    None if ON_GPU or _triton.interpreted_on() else "there is no GPU, and TRITON_INTERPRET=1 is not set"
)
TRITON = pytest.param(
    Target("triton", None, DTYPES),
    marks=pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT)),
    id="triton",
)


@pytest.fixture(scope="module", params=[REFERENCE, *CPU, TRITON])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """An implementation, with the instruction set chosen; memory that nobody wrote is NaN."""
    yield from chosen(request.param)


@pytest.fixture(scope="module", params=[REFERENCE, *CPU])
def quick_target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """One that is not interpreted, for tests of many calls."""
    yield from chosen(request.param)


def chosen(target: Target) -> Iterator[Target]:
    """Of these, while a test uses it."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    if target.instruction_set is not None:
        before = _native.kernels.instruction_set()
        _native.kernels.use_instruction_set(target.instruction_set)
        _native.kernels.poison_scratch(True)
    yield target
    if target.instruction_set is not None:
        _native.kernels.poison_scratch(False)
        _native.kernels.use_instruction_set(before)
    torch.use_deterministic_algorithms(False)
