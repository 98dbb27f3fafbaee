"""The implementations of the Hadamard transform that are held to its matrix."""

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
    max_size: int

    def __call__(self, x: Tensor, signs: Tensor | None = None, **more: Any) -> Tensor:
        """`onchip.hadamard` by this implementation; Triton's on a GPU where there is one, else interpreted."""
        device = "cuda" if ON_GPU and self.backend == "triton" else "cpu"
        signs = None if signs is None else signs.to(device)
        return onchip.hadamard(x.to(device), signs, backend=self.backend, **more).cpu()


REFERENCE = pytest.param(Target("reference", None, ALL, 32768), id="reference")
NATIVE = [] if _native.missing else _native.kernels.instruction_sets()
CPU = [pytest.param(Target("cpu", name, ALL, 32768), id=f"cpu-{name}") for name in NATIVE]
# Interpreted, bfloat16 is rounded by cutting off.
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if ON_GPU else (torch.float32, torch.float16)
ABSENT = _triton.missing or (
    None if ON_GPU or _triton.interpreted_on() else "there is no GPU, and TRITON_INTERPRET=1 is not set"
)
TRITON = pytest.param(
    Target("triton", None, DTYPES, 4096),
    marks=pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT)),
    id="triton",
)


@pytest.fixture(scope="module", params=[REFERENCE, *CPU, TRITON])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """An implementation, with the instruction set chosen; memory that nobody wrote is NaN."""
    target: Target = request.param
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
