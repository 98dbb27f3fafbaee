"""The implementations of the selective scan that are held to its definition."""

from collections.abc import Iterator

import pytest
import torch

from onchip.ops import _native

NATIVE = [] if _native.missing else [("cpu", name) for name in _native.kernels.instruction_sets()]


@pytest.fixture(scope="module", params=NATIVE, ids="-".join)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """An implementation's name, with the instruction set chosen; memory that nobody wrote is NaN."""
    name, instruction_set = request.param
    before = _native.kernels.instruction_set()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    _native.kernels.use_instruction_set(instruction_set)
    _native.kernels.poison_scratch(True)
    yield name
    _native.kernels.poison_scratch(False)
    _native.kernels.use_instruction_set(before)
    torch.use_deterministic_algorithms(False)
