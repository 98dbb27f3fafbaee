"""Triton's interpreter, twice as fast; and who served, where a native call may refuse."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from onchip.ops import _native, _step, _triton

if _triton.missing is None and _triton.interpreted_on():
    from triton.runtime.interpreter import InterpretedFunction

    first_call, called = InterpretedFunction.__call__, set()

    def call(helper: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        """Call a helper from a kernel.

        Each call prepares Triton's language for interpretation, which takes half of the time and is done already.
        """
        if helper.fn in called:
            return helper.rewrite()(*args, **kwargs)
        called.add(helper.fn)
        return first_call(helper, *args, **kwargs)

    InterpretedFunction.__call__ = call


@pytest.fixture(params=() if _native.missing else _native.kernels.instruction_sets())
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """What the native calls of `_step` answered, in order, on each instruction set; memory that nobody wrote is NaN."""
    before, answers = _native.kernels.instruction_set(), list[bool]()

    class Listening:
        def __getattr__(self, name: str) -> Callable[..., bool]:
            def call(*args: Any) -> bool:
                answers.append(getattr(_native.kernels, name)(*args))
                return answers[-1]

            return call

    monkeypatch.setattr(_step, "kernels", Listening())
    _native.kernels.use_instruction_set(request.param)
    _native.kernels.poison_scratch(True)
    yield answers
    _native.kernels.poison_scratch(False)
    _native.kernels.use_instruction_set(before)
