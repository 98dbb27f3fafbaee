"""What the benchmarks of operations other than attention share: a case, its contenders, the check and the timing.

A module of this package is a benchmark if it has `SUITES`, `cases` and `contest`, as `onchip.bench.causal_conv1d` has:
`cases` lists what there is to measure, and `contest` makes the contenders of a case. `onchip.cli.bench_operations`
gives each a command.
"""

import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from onchip.bench.attention import Error
from onchip.bench.machine import Machine
from onchip.bench.operation_case import OperationCase
from onchip.bench.rows import Row
from onchip.bench.timing import Candidate, Quartiles, interleave, quartiles, ratio


@dataclass(frozen=True)
class Contender:
    """One implementation at one case. `call` is timed; `results` brings what it gives into onchip's layout."""

    call: Callable[[], tuple[Tensor, ...]]
    results: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda results: results

    def found(self) -> tuple[Tensor, ...]:
        """What the call gives."""
        return tuple(x.detach() for x in self.results(self.call()))


@dataclass(frozen=True)
class Contest:
    """The contenders of a case, `onchip` and then the peer that its error is held against among them.

    `truth` gives the results in float64, with `names`; `nbytes` must at least cross to memory. `served_by` is the
    implementation behind onchip.
    """

    contenders: Mapping[str, Contender]
    truth: Callable[[], tuple[Tensor, ...]]
    names: Sequence[str]
    nbytes: int
    served_by: str


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
    half = torch.empty(held.nbytes // 8), torch.empty(held.nbytes // 8)  # read and written, in float32
    candidates = {name: Candidate(contender.call, nullcontext) for name, contender in held.contenders.items()}
    copy = {"copy": Candidate(lambda: half[0].copy_(half[1]))}
    times = interleave(candidates | copy, torch.device("cpu"), seconds=seconds, min_rounds=min_rounds)
    return Row(
        case=case,
        machine=dataclasses.replace(machine, threads=torch.get_num_threads()),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        served_by=held.served_by,
        rounds=len(times["onchip"]),
        ms={name: _rounded(quartiles([1e3 * t for t in values])) for name, values in times.items()},
        ratio={name: _rounded(ratio(times[name], times["onchip"])) for name in held.contenders if name != "onchip"},
        of="copy",
        fraction={name: round(ratio(times["copy"], times[name]).median, 4) for name in held.contenders},
    )


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
