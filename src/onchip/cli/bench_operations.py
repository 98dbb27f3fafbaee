"""`onchip bench causal_conv1d` and its like: a command for each of the benchmarks that share a frame."""

import functools
import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from onchip.bench import machine
from onchip.bench.cases import Device
from onchip.cli.bench import _folder, _in_fresh_processes, _measure_all, _one_place, _tell_of
from onchip.cli.errors import Failure
from onchip.cli.values import choices, integers

if TYPE_CHECKING:
    from onchip.bench.operations import Benchmark

DTYPES = ("float32", "bfloat16")
OPERATIONS = {
    "attention_features": "Measure what dropout, block masks and pages cost, against onchip.attention without them.",
    "mamba": "Measure whole models: transformers' Mamba with onchip and without, and decoding steps of Mamba-2.",
    "causal_conv1d": "Measure onchip.causal_conv1d, width 4 with SiLU, against PyTorch's conv1d and the package.",
    "selective_scan": "Measure onchip.selective_scan, N 16, against transformers' loop, mambapy and mamba_ssm.",
    "ssd": "Measure onchip.ssd against a batched ssd in plain PyTorch, transformers' and mamba_ssm's.",
}


def add_to(bench: typer.Typer) -> None:
    """Give each of the benchmarks its command."""
    for name, help in OPERATIONS.items():
        _command(bench, name, help)


def _command(bench: typer.Typer, name: str, help: str) -> None:
    suites = _SUITES.get(name, _PASSES)

    @bench.command(name=name, help=f"{help}\n\n{_HELP}\n{suites}")
    def command(
        suite: Annotated[str | None, typer.Option(metavar="SUITE,…", help="See above.", show_default="all")] = None,
        dtype: Annotated[str | None, typer.Option(metavar="DTYPE,…", help="float32, bfloat16.")] = None,
        lengths: Annotated[str | None, typer.Option(metavar="T,T,…", help="Instead of its own.")] = None,
        threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default one a core.")] = None,
        device: Annotated[Device, typer.Option(help="Where.")] = "cpu",
        malloc: Annotated[
            Literal["default", "tuned", "both"], typer.Option(help="glibc's own settings, or set to keep freed memory.")
        ] = "default",
        quick: Annotated[bool, typer.Option("--quick", help="One length and few rounds.")] = False,
        seconds: Annotated[float, typer.Option(min=0.0, help="Time to spend on a case, at least five rounds.")] = 3.0,
        out: Annotated[Path | None, typer.Option(help=f"Folder for {name}.jsonl{_PICTURE.get(name, '')}.")] = None,
        record: Annotated[bool, typer.Option("--record", help="The same into benchmarks/results/, by device.")] = False,
    ) -> None:
        _one_place(record, out)
        asked = choices("--dtype", dtype, DTYPES) if dtype else []
        wanted = integers("--lengths", lengths) if lengths else []
        if malloc == "both" or dict(os.environ) != machine.environment(malloc):
            raise typer.Exit(_in_fresh_processes(["default", "tuned"] if malloc == "both" else [malloc]))

        if name == "mamba" and find_spec("transformers") is None:
            raise Failure("onchip bench mamba needs transformers (pip install 'transformers>=5.15')")

        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise Failure("--device cuda: PyTorch finds no GPU here", exit_code=2)
        torch.set_num_threads(threads or machine.cores())
        here = machine.describe(device, malloc)
        benchmark = cast("Benchmark", import_module(f"onchip.bench.{name}"))
        known = (*benchmark.SUITES, *getattr(benchmark, "ON_REQUEST", ()))
        suites = choices("--suite", suite, known) if suite else benchmark.SUITES
        plan = benchmark.cases(suites, dtypes=asked, lengths=wanted, quick=quick, device=device)

        from onchip.bench import operations, plot_mamba

        measured = functools.partial(
            operations.measure,
            benchmark.contest,
            machine=here,
            device=torch.device(device),
            seconds=0.3 if quick else seconds,
            min_rounds=3 if quick else 5,
        )
        folder = _folder(record, out, here)
        wrong = _measure_all(plan, measured, name, folder, gpu=here.gpu)
        if folder is not None and name == "mamba" and not here.gpu:
            print(plot_mamba.mamba(folder))
        _tell_of(wrong)


_PICTURE = {"mamba": " and mamba.png"}
_HELP = """\
Before a case is timed its result, gradients included, must be as close to float64 as the tests ask. The contenders then
take turns for many rounds. A ratio is the peer's time over onchip's: the median over the rounds, half the distance
between the quartiles beside it. Most figures are also a fraction of the rate at which memory copies what must cross to
it, or of torch.mm's. On a GPU all is in bfloat16.
"""
_PASSES = """\
* **forward**: that pass alone

* **backward**: both passes

* **step**: a token of one sequence, on a GPU of 128, whatever the lengths

On a GPU the passes have 16,384 tokens in all, and mamba_ssm, causal_conv1d and fla take part where they run.
"""
_SUITES = {
    "attention_features": """\
* **dropout**: 0.1 of the probabilities, T 2048

* **block_sparse**: tiles of 128 at T 8192, from 1/16 to 3/4 of them seen

* **paged**: a decoding step over 8192 keys in pages of 16
""",
    "mamba": """\
* **forward**: transformers' Mamba, 4 layers of 256 features, over T tokens, and the time of a token, which stays

* **train**: both passes of it, without an optimiser; also over mambapy's scan where that is installed

* **step**: a decoding step of a model of Mamba-2 130M's shape, against the rate at which its weights are read

* **context**: a decoding step after T tokens, 4 layers of 256 features: its time and its state do not grow

* **once**, where asked for: train at T 1024, transformers without onchip timed a single time, as it takes minutes
""",
}
