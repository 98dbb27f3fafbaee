"""The implementations that are held to the reference."""

from collections.abc import Iterator

import pytest
import torch

from onchip.ops import _native

TARGETS = () if _native.missing else tuple(_native.kernels.instruction_sets())


@pytest.fixture(scope="module", params=TARGETS)
def native(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native backend's name, with the instruction set chosen; memory that nobody wrote is NaN."""
    before = _native.kernels.instruction_set()
    _native.kernels.use_instruction_set(request.param)
    _native.kernels.poison_scratch(True)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    yield "cpu"
    torch.use_deterministic_algorithms(False)
    _native.kernels.poison_scratch(False)
    _native.kernels.use_instruction_set(before)
