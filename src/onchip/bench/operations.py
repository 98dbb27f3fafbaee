"""What the benchmarks of operations other than attention share: a case, its contenders, the check and the timing.

A module of this package is a benchmark if it has `SUITES`, `cases` and `contest`, as `onchip.bench.causal_conv1d` has:
`cases` lists what there is to measure on a CPU or a GPU, and `contest` makes the contenders of a case on a device.
`onchip.cli.bench_operations` gives each a command.
"""

import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from onchip.bench import report
from onchip.bench.attention import Error, judge, rounded
from onchip.bench.cases import Device
from onchip.bench.ceilings import GIGABYTE, Ceiling, copying, products, reading, significant
from onchip.bench.machine import Machine
from onchip.bench.operation_case import OperationCase
from onchip.bench.rows import Row
from onchip.bench.timing import Candidate, interleave, quartiles, ratio, time_once

CPU = torch.device("cpu")


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
    the `ceiling`; 0 where nothing is said of it, and where products of matrices are. `served_by` is the implementation
    behind onchip. Those named in `once` take long: they are timed once, and not warm. A call of a whole model is timed
    with the launches of its kernels. With `tokens` the time of each is told, and with `figures` what else there is to
    tell.
    """

    contenders: Mapping[str, Contender]
    truth: Callable[[], tuple[Tensor, ...]]
    names: Sequence[str]
    served_by: str
    nbytes: int = 0
    ceiling: Literal["mm", "copy", "read"] | None = "copy"
    once: Sequence[str] = ()
    whole_model: bool = False
    tokens: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)


class Benchmark(Protocol):
    """A module of this package that `onchip bench` has a command for."""

    SUITES: Sequence[str]

    def cases(
        self, suites: Sequence[str], *, dtypes: Sequence[str], lengths: Sequence[int], quick: bool, device: Device
    ) -> list[OperationCase]:
        """What there is to measure."""

    def contest(self, case: OperationCase, device: torch.device) -> Contest:
        """Who measures up in a case, with inputs of their own."""


def optional(package: str, make: Callable[[], Contender]) -> dict[str, Contender]:
    """The contender of that name, if the package is installed; one that does not run is left out, which is said."""
    if find_spec(package) is None:
        return {}
    try:
        make().found()
    except Exception as error:  # whatever a package raises that was built for another torch or GPU
        reason = str(error).strip().partition("\n")[0]
        report.console.print(f"{package} is left out: {type(error).__name__}: {reason}", markup=False, style="dim")
        return {}
    return {package: make()}  # anew: a step moves its state on


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
    contest: Callable[[OperationCase, torch.device], Contest],
    case: OperationCase,
    machine: Machine,
    *,
    device: torch.device = CPU,
    seconds: float,
    min_rounds: int,
) -> Row:
    """Check the case, time it, and say what was found.

    Raises:
        ArithmeticError: onchip's result is further from the truth than twice the first peer's and 4 ulps of the largest
            value. Nothing was timed.
    """
    held = contest(case, device)
    check(case, held)
    candidates = {name: Candidate(c.call, c.scope, held.whole_model) for name, c in held.contenders.items()}
    slow = {name: candidates.pop(name) for name in held.once}
    ceiling = _ceiling(case, held, device)
    timed = candidates | ({ceiling.name: ceiling.candidate} if ceiling else {})
    times = interleave(timed, device, seconds=seconds, min_rounds=min_rounds)
    for name, candidate in slow.items():
        times[name] = [time_once(candidate, device)] * len(times["onchip"])
    amount = held.nbytes or case.operations
    a_token = {"µs a token": 1e6 * quartiles(times["onchip"]).median / held.tokens} if held.tokens else {}
    return Row(
        case=case,
        machine=dataclasses.replace(machine, threads=torch.get_num_threads()),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        served_by=held.served_by,
        rounds=len(times["onchip"]),
        ms={name: rounded(quartiles([1e3 * t for t in values])) for name, values in times.items()},
        ratio={name: rounded(ratio(times[name], times["onchip"])) for name in held.contenders if name != "onchip"},
        of=ceiling.name if ceiling else "",
        fraction=ceiling.fraction(amount, times) if ceiling else {},
        rate=ceiling.rates(amount, times) if ceiling else {},
        figures={name: significant(figure) for name, figure in (a_token | dict(held.figures)).items()},
    )


def _ceiling(case: OperationCase, held: Contest, device: torch.device) -> Ceiling | None:
    """Of memory on a CPU the same bytes, which may be in its caches for onchip too; on a GPU more than its caches."""
    if held.ceiling == "mm":
        return products(case.dtype, device)
    if held.ceiling == "read":
        return reading(held.nbytes, device)
    if held.ceiling == "copy":
        return copying(2 * GIGABYTE if device.type == "cuda" else held.nbytes, device)
    return None


def check(case: OperationCase, held: Contest) -> None:
    """Our error is at most twice the first peer's, plus 4 ulps of the largest value, for each result.

    Raises:
        ArithmeticError: naming the tensor and both errors.
    """
    ours, peer = list(held.contenders.values())[:2]
    for name, want, *found in zip(held.names, held.truth(), ours.found(), peer.found(), strict=True):
        ours_off, peer_off = ((x.double() - want).abs().max().item() for x in found)
        eps = torch.finfo(found[0].dtype).eps
        judge(case.label, Error(name, ours_off, peer_off, want.abs().max().item(), eps))
