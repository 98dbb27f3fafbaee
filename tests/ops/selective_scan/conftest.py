"""The implementations of the selective scan that are held to its definition."""

from collections.abc import Iterator

import pytest

TARGETS = [("reference", None)]


@pytest.fixture(scope="module", params=TARGETS, ids=lambda t: t[0] if t[1] is None else "-".join(t))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """An implementation's name."""
    name, _ = request.param
    yield name
