"""What the benchmarks of operations other than attention share: a case, its contenders, the check and the timing.

A module of this package is a benchmark if it has `SUITES`, `cases` and `contest`, as `onchip.bench.causal_conv1d` has:
`cases` lists what there is to measure, and `contest` makes the contenders of a case. `onchip.cli.bench_operations`
gives each a command.
"""

import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from onchip.bench.attention import Error
from onchip.bench.machine import Machine
from onchip.bench.operation_case import OperationCase
from onchip.bench.rows import Row
from onchip.bench.timing import Candidate, Quartiles, interleave, quartiles, ratio, time_once


@dataclass(frozen=True)
class Contender:
    """One implementation at one case. `call` is timed, inside `scope`; `results` brings what it gives into our layout.

    Where the call's results are too dear to compare, `checked` gives those of a smaller one.
    """

    call: Callable[[], Any]
    results: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda results: results
    scope: Callable[[], AbstractContextManager[object]] = nullcontext
    checked: Callable[[], tuple[Tensor, ...]] | None = None

    def found(self) -> tuple[Tensor, ...]:
        """What is compared."""
        with self.scope():
            return tuple(x.detach() for x in self.results((self.checked or self.call)()))


@dataclass(frozen=True)
class Contest:
    """The contenders of a case, `onchip` and then the peer that its error is held against among them.

    `truth` gives the results in float64, with `names`; `nbytes` must at least cross to memory, or be read where that is
    the `ceiling`; 0 for none. `served_by` is the implementation behind onchip. Those named in `once` take minutes: they
    are timed once, and not warm. With `tokens` the time of each is told, and with `figures` what else there is to tell.
    """

    contenders: Mapping[str, Contender]
    truth: Callable[[], tuple[Tensor, ...]]
    names: Sequence[str]
    served_by: str
    nbytes: int = 0
    ceiling: Literal["copy", "read"] = "copy"
    once: Sequence[str] = ()
    tokens: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)


class Benchmark(Protocol):
    """A module of this package that `onchip bench` has a command for."""

    SUITES: Sequence[str]

    def cases(
        self, suites: Sequence[str], *, dtypes: Sequence[str], lengths: Sequence[int], quick: bool
    ) -> list[OperationCase]:
        """What there is to measure."""

    def contest(self, case: OperationCase) -> Contest:
        """Who measures up in a case, with inputs of their own."""


def both_passes(
    run: Callable[..., Tensor], inputs: Sequence[Tensor], weights: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """A call of `run`, and of its backward pass where an input requires a gradient; the output, then the gradients."""
    wanted = [x for x in inputs if x.requires_grad]

    def call() -> tuple[Tensor, ...]:
        if not wanted:
            with torch.no_grad():
                return (run(*inputs),)
        out = run(*inputs)
        return (out, *torch.autograd.grad(out, wanted, weights))

    return call


def measure(
    contest: Callable[[OperationCase], Contest],
    case: OperationCase,
    machine: Machine,
    *,
    seconds: float,
    min_rounds: int,
) -> Row:
    """Check the case, time it, and say what was found.

    Raises:
        ArithmeticError: onchip's result is further from the truth than twice the first peer's and 4 ulps of the largest
            value. Nothing was timed.
    """
    held = contest(case)
    check(case, held)
    candidates = {name: Candidate(contender.call, contender.scope) for name, contender in held.contenders.items()}
    slow = {name: candidates.pop(name) for name in held.once}
    if held.nbytes:
        candidates[held.ceiling] = Candidate(_ceiling(held))
    times = interleave(candidates, torch.device("cpu"), seconds=seconds, min_rounds=min_rounds)
    for name, candidate in slow.items():
        times[name] = [time_once(candidate)] * len(times["onchip"])
    a_token = {"µs a token": 1e6 * quartiles(times["onchip"]).median / held.tokens} if held.tokens else {}
    return Row(
        case=case,
        machine=dataclasses.replace(machine, threads=torch.get_num_threads()),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        served_by=held.served_by,
        rounds=len(times["onchip"]),
        ms={name: _rounded(quartiles([1e3 * t for t in values])) for name, values in times.items()},
        ratio={name: _rounded(ratio(times[name], times["onchip"])) for name in held.contenders if name != "onchip"},
        of=held.ceiling if held.nbytes else "",
        fraction={
            name: round(ratio(times[held.ceiling], times[name]).median, 4) for name in held.contenders if held.nbytes
        },
        figures={name: float(f"{figure:.4g}") for name, figure in (a_token | dict(held.figures)).items()},
    )


def _ceiling(held: Contest) -> Callable[[], object]:
    """The same bytes copied, half of them read and half written, or read alone; in float32."""
    if held.ceiling == "read":
        whole = torch.ones(held.nbytes // 4)
        return whole.sum
    half = torch.empty(held.nbytes // 8), torch.empty(held.nbytes // 8)
    return lambda: half[0].copy_(half[1])


def check(case: OperationCase, held: Contest) -> None:
    """Our error is at most twice the first peer's, plus 4 ulps of the largest value, for each result.

    Raises:
        ArithmeticError: naming the tensor and both errors.
    """
    ours, peer = list(held.contenders.values())[:2]
    for name, want, *found in zip(held.names, held.truth(), ours.found(), peer.found(), strict=True):
        ours_off, peer_off = ((x.double() - want).abs().max().item() for x in found)
        error = Error(name, ours_off, peer_off, want.abs().max().item(), torch.finfo(found[0].dtype).eps)
        said = f"{case.label}: {name} is off by {error.ours:.1e}, the peer's by {error.peer:.1e}"
        if not error.peer <= 0.1 * error.largest:
            raise ArithmeticError(f"{said}: the peer computes something else")
        if not error.ours <= error.allowed:
            raise ArithmeticError(f"{said}; allowed is {error.allowed:.1e}")


def _rounded(values: Quartiles) -> Quartiles:
    return Quartiles(*(float(f"{value:.4g}") for value in values))
