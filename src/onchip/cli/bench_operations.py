"""`onchip bench causal_conv1d` and its like: a command for each of the benchmarks that share a frame."""

import functools
import itertools
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from onchip.bench import machine
from onchip.cli.bench import _in_fresh_processes, _results
from onchip.cli.errors import Failure
from onchip.cli.values import choices, integers

if TYPE_CHECKING:
    from onchip.bench.operation_case import OperationCase
    from onchip.bench.operations import Benchmark

DTYPES = ("float32", "bfloat16")
OPERATIONS = {
    "causal_conv1d": "Measure onchip.causal_conv1d, width 4 with SiLU, against PyTorch's depthwise conv1d.",
    "selective_scan": "Measure onchip.selective_scan, D 512, N 16, against transformers' loop and mambapy.",
}


def add_to(bench: typer.Typer) -> None:
    """Give each of the benchmarks its command."""
    for name, help in OPERATIONS.items():
        _command(bench, name, help)


def _command(bench: typer.Typer, name: str, help: str) -> None:
    @bench.command(name=name, help=f"{help}\n\n{_HELP}")
    def command(
        suite: Annotated[
            str | None, typer.Option(metavar="SUITE,…", help="forward, backward.", show_default="all")
        ] = None,
        dtype: Annotated[str | None, typer.Option(metavar="DTYPE,…", help="float32, bfloat16.")] = None,
        lengths: Annotated[str | None, typer.Option(metavar="T,T,…", help="Instead of its own.")] = None,
        threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default one a core.")] = None,
        malloc: Annotated[
            Literal["default", "tuned", "both"], typer.Option(help="glibc's own settings, or set to keep freed memory.")
        ] = "default",
        quick: Annotated[bool, typer.Option("--quick", help="One length and few rounds.")] = False,
        seconds: Annotated[float, typer.Option(min=0.0, help="Time to spend on a case, at least five rounds.")] = 3.0,
        out: Annotated[Path | None, typer.Option(help=f"Folder for {name}.jsonl.")] = None,
        record: Annotated[bool, typer.Option("--record", help="The same into benchmarks/results/, by device.")] = False,
    ) -> None:
        if record and out is not None:
            raise Failure("--record and --out name two places; give one", exit_code=2)
        asked = choices("--dtype", dtype, DTYPES) if dtype else []
        wanted = integers("--lengths", lengths) if lengths else []
        if malloc == "both" or dict(os.environ) != machine.environment(malloc):
            raise typer.Exit(_in_fresh_processes(["default", "tuned"] if malloc == "both" else [malloc]))

        import torch

        torch.set_num_threads(threads or machine.cores())
        here = machine.describe("cpu", malloc)
        folder = _results() / here.slug if record else out
        benchmark = cast("Benchmark", import_module(f"onchip.bench.{name}"))
        suites = choices("--suite", suite, benchmark.SUITES) if suite else benchmark.SUITES
        plan = benchmark.cases(suites, dtypes=asked, lengths=wanted, quick=quick)
        _run(benchmark, name, plan, here, folder, seconds=0.3 if quick else seconds, min_rounds=3 if quick else 5)


_HELP = """\
Before a case is timed its result, gradients included, must be as close to float64 as the tests ask. The contenders then
take turns for many rounds. A ratio is the peer's time over onchip's: the median over the rounds, half the distance
between the quartiles beside it. Each figure is also a fraction of the rate of a copy of what must cross to memory.

* **forward**: that pass alone

* **backward**: both passes
"""


def _run(
    benchmark: "Benchmark",
    name: str,
    plan: "list[OperationCase]",
    here: machine.Machine,
    folder: Path | None,
    *,
    seconds: float,
    min_rounds: int,
) -> None:
    """Measure and show the cases, keeping their rows."""
    from onchip.bench import operations, report, rows

    measured = functools.partial(
        operations.measure, benchmark.contest, machine=here, seconds=seconds, min_rounds=min_rounds
    )
    wrong = []
    for suite, group in itertools.groupby(report.progress(plan), key=lambda case: case.suite):
        found = []
        for case in group:
            try:
                found.append(measured(case))
            except ArithmeticError as error:
                wrong.append(str(error))
                continue
            if folder is not None:
                rows.merge(folder / f"{name}.jsonl", found[-1:])
        report.show(suite, found, name)
    if wrong:
        raise Failure(f"not timed, being wrong: {'; '.join(wrong)}")
