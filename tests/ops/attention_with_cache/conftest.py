"""The implementations that are held to `onchip.attention`'s definition."""

from collections.abc import Iterator

import pytest
import torch

from onchip.ops import _native, _triton

NATIVE = () if _native.missing else tuple(f"cpu-{name}" for name in _native.kernels.instruction_sets())
TRITON = (
    ("triton",)
    if _triton.limits(torch.device("cuda" if torch.cuda.is_available() else "cpu")) is None
    and (torch.cuda.is_available() or _triton.interpreted_on())
    else ()
)


@pytest.fixture(params=("reference", *NATIVE, *TRITON))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """An implementation's name; memory that nobody wrote is NaN."""
    name, _, instruction_set = request.param.partition("-")
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    if instruction_set:
        before = _native.kernels.instruction_set()
        _native.kernels.use_instruction_set(instruction_set)
        _native.kernels.poison_scratch(True)
    yield name
    if instruction_set:
        _native.kernels.poison_scratch(False)
        _native.kernels.use_instruction_set(before)
    torch.use_deterministic_algorithms(False)
