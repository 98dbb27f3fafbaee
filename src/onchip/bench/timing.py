"""Fair timing: candidates take turns in one process, so that whatever disturbs one disturbs all.

On a GPU a call's time is that of its kernels, between two events. Before each call 1 GB is written, which empties the
L2 cache, and the GPU is kept waiting while the host prepares the launches, whose price is so left out. It is kept in
where a candidate is a whole model, whose launches nobody hides.
"""

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

HOST_CYCLES = 4_000_000  # some 2 ms of a GPU's clock, in which the host prepares the launches of a call
SHORTEST_SAMPLE = 2e-3  # seconds on a CPU; shorter calls are repeated within a sample, or the clock's cost would show


class Quartiles(NamedTuple):
    """The middle of a set of measurements, and how far the middle half of them reaches."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Candidate:
    """Something to time: `call` is timed, inside `scope`, which is not; on a GPU with its launches where asked for."""

    call: Callable[[], object]
    scope: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)
    with_launches: bool = False


def interleave(
    candidates: Mapping[str, Candidate], device: torch.device, *, seconds: float, min_rounds: int, max_rounds: int = 200
) -> dict[str, list[float]]:
    """Seconds per call of each candidate, one figure a round, for about `seconds` in all.

    Each round runs every candidate once, starting one further than the round before. Figures of the same round stand
    under the same conditions: compare them with `ratio`.

    >>> times = interleave({"add": Candidate(lambda: 1 + 1)}, torch.device("cpu"), seconds=0.01, min_rounds=3)
    >>> len(times["add"]) >= 3
    True
    """
    names = list(candidates)
    calls = {}
    round_seconds = 0.0
    with _no_garbage_collection():
        for name in names:
            _sample(candidates[name], 1, device)  # warm up: first-touch memory, thread pools, lazy initialisation
            once = _sample(candidates[name], 1, device)
            calls[name] = 1 if device.type == "cuda" else max(1, round(SHORTEST_SAMPLE / once))
            round_seconds += once * calls[name]
        rounds = min(max(min_rounds, int(seconds / round_seconds)), max_rounds)
        times: dict[str, list[float]] = {name: [] for name in names}
        for r in range(rounds):
            first = r % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(_sample(candidates[name], calls[name], device))
    return times


def quartiles(values: list[float]) -> Quartiles:
    """Lower quartile, median and upper quartile.

    >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
    Quartiles(low=2.0, median=3.0, high=4.0)
    """
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def ratio(numerator: list[float], denominator: list[float]) -> Quartiles:
    """Quartiles of the ratios taken round by round, so that slow drift of the machine cancels.

    >>> ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    Quartiles(low=2.0, median=2.0, high=2.0)
    """
    return quartiles([a / b for a, b in zip(numerator, denominator, strict=True)])


def time_once(candidate: Candidate, device: torch.device) -> float:
    """Seconds of one call, not warm: for one that takes minutes.

    >>> time_once(Candidate(lambda: 1 + 1), torch.device("cpu")) > 0
    True
    """
    with _no_garbage_collection():
        return _sample(candidate, 1, device)


def _sample(candidate: Candidate, calls: int, device: torch.device) -> float:
    with candidate.scope():
        if device.type == "cuda":
            return _sample_cuda(candidate, device)
        start = time.perf_counter()
        for _ in range(calls):
            candidate.call()
        return (time.perf_counter() - start) / calls


def _sample_cuda(candidate: Candidate, device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    _flush(device).zero_()
    if candidate.with_launches:
        torch.cuda.synchronize(device)
    else:
        torch.cuda._sleep(HOST_CYCLES)  # type: ignore[no-untyped-call]
    start.record()
    candidate.call()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds * 1e-3


@functools.cache
def _flush(device: torch.device) -> torch.Tensor:
    return torch.empty(2**28, device=device)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
