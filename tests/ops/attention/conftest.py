"""The implementations that are held to the reference."""

from collections.abc import Iterator

import pytest

from onchip.ops import _native

TARGETS = () if _native.missing else tuple(("cpu", name) for name in _native.kernels.instruction_sets())


@pytest.fixture(scope="module", params=TARGETS, ids="-".join)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """An implementation's name, with the instruction set chosen and its working memory poisoned."""
    name, instruction_set = request.param
    before = _native.kernels.instruction_set()
    _native.kernels.use_instruction_set(instruction_set)
    _native.kernels.poison_scratch(True)
    yield name
    _native.kernels.poison_scratch(False)
    _native.kernels.use_instruction_set(before)


@pytest.fixture(params=dict.fromkeys(name for name, _ in TARGETS))
def implementation(request: pytest.FixtureRequest) -> str:
    """An implementation's name, on its best instruction set: for what does not depend on the arithmetic."""
    return request.param
