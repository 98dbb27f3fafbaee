"""Which implementation of an op runs, and why: the only code that chooses.

An op lists its implementations, fastest first. By default the first that can serve the call runs; `backend="…"`
asks for one and raises where it cannot serve. The reference serves everything, and where it stands in for a missing
kernel it says so once.
"""

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    `refusal` takes the op's first tensors (q, k and v for attention) and says why this implementation cannot serve
    them, or None.
    """

    name: str
    refusal: Callable[[Tensor, Tensor, Tensor], str | None]


_OPS: dict[Callable[..., Any], Sequence[Implementation]] = {}
_WARNED: set[tuple[str, str]] = set()


def register(function: Callable[..., Any], implementations: Sequence[Implementation]) -> None:
    """Make a public function known to `explain`."""
    _OPS[function] = implementations


def choose(
    op: str, implementations: Sequence[Implementation], backend: str | None, q: Tensor, k: Tensor, v: Tensor
) -> str:
    """The name of the implementation that runs this call."""
    first_refusal = None
    for implementation in implementations:
        if backend is not None and implementation.name != backend:
            continue
        refusal = implementation.refusal(q, k, v)
        if refusal is None:
            if first_refusal is not None:
                _warn_once(op, first_refusal)
            return implementation.name
        if backend is not None:
            raise ValueError(f"{op}: backend={backend!r} cannot serve this call: {refusal}")
        first_refusal = first_refusal or refusal
    names = ", ".join(repr(implementation.name) for implementation in implementations)
    raise ValueError(f"{op}: backend must be None or one of {names}, got {backend!r}")


def _warn_once(op: str, reason: str) -> None:
    if (op, reason) not in _WARNED:
        _WARNED.add((op, reason))
        warnings.warn(
            f"{op} runs on its slow reference: {reason}. backend='reference' asks for it without this warning.",
            stacklevel=5,
        )


@dataclass(frozen=True)
class Candidate:
    """One row of an `Explanation`; `refusal` is None where the implementation can serve the call."""

    name: str
    refusal: str | None


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; its `str()` is a table. `chosen` is None where the `backend` asked for cannot serve."""

    op: str
    candidates: tuple[Candidate, ...]
    chosen: str | None

    def __str__(self) -> str:
        width = max(len(candidate.name) for candidate in self.candidates)
        lines = [self.op]
        for candidate in self.candidates:
            mark = "→" if candidate.name == self.chosen else " "
            state = "serves" if candidate.refusal is None else f"cannot serve: {candidate.refusal}"
            lines.append(f"{mark} {candidate.name:<{width}}  {state}")
        return "\n".join(lines)


def explain(op: Callable[..., Any], *args: Any, backend: str | None = None, **kwargs: Any) -> Explanation:
    """Which implementations of `op` can serve a call, which one runs, and why not the others.

    Takes one of onchip's functions and the arguments of a call to it. Computes nothing.

    Raises:
        TypeError: `op` is not one of onchip's functions, or does not take these arguments.

    >>> import torch, onchip
    >>> q = torch.randn(1, 16, 2, 8)
    >>> print(onchip.explain(onchip.attention, q, q, q, backend="reference"))
    attention
      cpu        ...
    → reference  serves
    """
    if op not in _OPS:
        known = ", ".join(sorted(function.__name__ for function in _OPS))
        raise TypeError(f"op must be one of onchip's functions ({known}), got {op!r}")
    bound = inspect.signature(op).bind(*args, **kwargs).arguments
    q, k, v = list(bound.values())[:3]
    candidates = tuple(Candidate(i.name, i.refusal(q, k, v)) for i in _OPS[op])
    serving = [c.name for c in candidates if c.refusal is None and backend in (None, c.name)]
    return Explanation(op.__name__, candidates, serving[0] if serving else None)
