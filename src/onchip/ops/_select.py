"""Which implementation of an op runs, and why: the only code that chooses.

An op lists its implementations, fastest first. By default the first that can serve the call runs; `backend="…"`
asks for one and raises where it cannot serve. The reference serves everything, and where it stands in for a missing
kernel it says so once.
"""

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    `devices` are the types of device it is made for, by default any; on those of `on_request` it runs only where
    `backend` asks for it. `limits` takes the op's tensors (q, k and v for attention), which are on such a device, and
    says why this implementation cannot serve them, or None. `batch_invariant`: whether it has that option.
    """

    name: str
    limits: Callable[..., str | None] = lambda *tensors: None
    devices: tuple[str, ...] | None = None
    on_request: tuple[str, ...] = ()
    batch_invariant: bool = False

    def refusal(self, *tensors: Tensor, requested: bool = True, batch_invariant: bool = False) -> str | None:
        """Why this implementation does not serve a call on these tensors, or None."""
        device = tensors[0].device
        if self.devices is not None and not (
            (kind := device.type) in self.devices or (requested and kind in self.on_request)
        ):
            return f"it runs on {'GPUs' if 'cuda' in self.devices else 'CPUs'}, and the call's tensors are on {device}"
        if batch_invariant and not self.batch_invariant:
            return "batch_invariant=True: the order of its sums, which are PyTorch's, depends on the shapes"
        return self.limits(*tensors)


class _Op(NamedTuple):
    implementations: Sequence[Implementation]
    tensors: int


_OPS: dict[Callable[..., Any], _Op] = {}
_WARNED: set[tuple[str, str]] = set()


def register(function: Callable[..., Any], implementations: Sequence[Implementation], tensors: int) -> None:
    """Make a public function known to `explain`; its first arguments, `tensors` of them, are what decides."""
    _OPS[function] = _Op(implementations, tensors)


def choose(
    op: str,
    implementations: Sequence[Implementation],
    backend: str | None,
    *tensors: Tensor,
    batch_invariant: bool = False,
) -> str:
    """The name of the implementation that runs this call."""
    if backend is not None:
        return _requested(op, implementations, backend, *tensors, batch_invariant=batch_invariant)
    refusals = []
    for implementation in implementations:
        refusal = implementation.refusal(*tensors, requested=False, batch_invariant=batch_invariant)
        if refusal is None:
            if implementation.name == "reference":
                _warn_once(op, implementations, *tensors)
            return implementation.name
        refusals.append(f"{implementation.name}: {refusal}")
    raise ValueError(f"{op}: no implementation can serve this call: {'; '.join(refusals)}")


def _requested(
    op: str, implementations: Sequence[Implementation], backend: str, *tensors: Tensor, batch_invariant: bool
) -> str:
    for implementation in implementations:
        if implementation.name == backend:
            refusal = implementation.refusal(*tensors, batch_invariant=batch_invariant)
            if refusal is None:
                return backend
            raise ValueError(f"{op}: backend={backend!r} cannot serve this call: {refusal}")
    names = ", ".join(repr(implementation.name) for implementation in implementations)
    raise ValueError(f"{op}: backend must be None or one of {names}, got {backend!r}")


def _warn_once(op: str, implementations: Sequence[Implementation], *tensors: Tensor) -> None:
    """Say why the kernels made for this device do not serve; where there are none the reference is no surprise."""
    device = tensors[0].device.type
    reasons = [i.limits(*tensors) for i in implementations if i.devices is not None and device in i.devices]
    reason = "; ".join(reason for reason in reasons if reason is not None)
    if reason and (op, reason) not in _WARNED:
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

    Takes one of onchip's functions that have a `backend` argument, and the arguments of a call to it. Computes nothing.

    Raises:
        TypeError: `op` is not one of these functions, or does not take these arguments.

    >>> import torch, onchip
    >>> q = torch.randn(1, 16, 2, 8)
    >>> print(onchip.explain(onchip.attention, q, q, q, backend="reference"))
    attention
      cpu        ...
      triton     ...
    → reference  serves
    """
    if op not in _OPS:
        known = ", ".join(sorted(function.__name__ for function in _OPS))
        raise TypeError(f"op must be one of onchip's functions that take backend= ({known}), got {op!r}")
    bound = inspect.signature(op).bind(*args, **kwargs).arguments
    implementations, count = _OPS[op]
    tensors, invariant = list(bound.values())[:count], bound.get("batch_invariant", False)
    candidates = tuple(
        Candidate(i.name, i.refusal(*tensors, requested=backend == i.name, batch_invariant=invariant))
        for i in implementations
    )
    serving = [c.name for c in candidates if c.refusal is None and backend in (None, c.name)]
    return Explanation(op.__name__, candidates, serving[0] if serving else None)
