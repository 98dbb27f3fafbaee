"""`onchip bench`: onchip against its peers, side by side."""

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from onchip.bench import machine
from onchip.bench.cases import DTYPES, GPU_SUITES, MODEL_SUITES, SUITES, Device, cases, model_cases
from onchip.cli.errors import Failure
from onchip.cli.values import choices, integers

if TYPE_CHECKING:
    from onchip.bench.report import AnyCase
    from onchip.bench.rows import Row

bench = typer.Typer(
    name="bench",
    help="Measure an operation against its peers, interleaved in one process. Figures are ratios.",
    no_args_is_help=True,
)


@bench.callback()
def _group() -> None:
    pass


@bench.command()
def attention(
    suite: Annotated[
        str | None, typer.Option(metavar="SUITE,…", help="What to measure.", show_default="all for the device")
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE,…", help="Instead of the suite's own.")] = None,
    lengths: Annotated[str | None, typer.Option(metavar="T,T,…", help="Instead of the suite's own.")] = None,
    head_dims: Annotated[str | None, typer.Option(metavar="D,D,…", help="Instead of the suite's own.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default one a core.")] = None,
    device: Annotated[Device, typer.Option(help="Where.")] = "cpu",
    malloc: Annotated[
        Literal["default", "tuned", "both"],
        typer.Option(help="glibc's own settings, or set to keep freed memory, which helps PyTorch most."),
    ] = "default",
    flex: Annotated[bool, typer.Option("--flex", help="Also compiled flex_attention; 10 s more a case.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Short sequences and few rounds: a minute, rough.")] = False,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time to spend on a case, at least five rounds.")] = 3.0,
    out: Annotated[Path | None, typer.Option(help="Folder for attention.jsonl and attention.png.")] = None,
    record: Annotated[bool, typer.Option("--record", help="The same into benchmarks/results/, by device.")] = False,
) -> None:
    """Measure onchip.attention against PyTorch's scaled_dot_product_attention (flash and math) and flex_attention.

    Before a case is timed its result, gradients included, must be as close to float64 as the tests ask. The contenders
    then take turns for many rounds. A ratio is the peer's time over onchip's: the median over the rounds, the quartiles
    beside it. Each figure is also a fraction of what torch.mm reaches at the same precision in the same rounds or, for
    decode, of the rate at which memory is read.

    * **forward**, **backward**: float32, full and causal, T 512 to 8192; backward is both passes
    * **bf16**: both passes in bfloat16
    * **window**: 256 keys at T 4096
    * **decode**: one query, 32 heads on 8 key heads, Tk 32768
    * **memory**: the peak beyond inputs and outputs, at T 8192
    * **overhead**: a tiny call

    On a GPU everything is in bfloat16, 16,384 tokens in all and 2048 = heads × head dim, T 1024 to 16384; **backward**
    is that pass alone; decode has Tk 65536 and is held against a copy's rate; bf16 and overhead are left out.

    For example: `onchip bench attention --suite forward --lengths 1024,4096 --malloc both`
    """
    _one_place(record, out)
    suites = GPU_SUITES if device == "cuda" else SUITES
    plan = [
        case
        for name in (choices("--suite", suite, suites) if suite else suites)
        for case in cases(
            name,
            dtypes=choices("--dtype", dtype, DTYPES) if dtype else (),
            lengths=integers("--lengths", lengths) if lengths else (),
            head_dims=integers("--head-dims", head_dims) if head_dims else (),
            quick=quick,
            device=device,
        )
    ]
    if malloc == "both" or dict(os.environ) != machine.environment(malloc):
        raise typer.Exit(_in_fresh_processes(["default", "tuned"] if malloc == "both" else [malloc]))

    import torch

    from onchip.bench import plot, plot_rates
    from onchip.bench.attention import measure

    if device == "cuda" and not torch.cuda.is_available():
        raise Failure("--device cuda: PyTorch finds no GPU here", exit_code=2)
    torch.set_num_threads(threads or machine.cores())
    here = machine.describe(device, malloc)
    folder = _folder(record, out, here)
    measured = functools.partial(
        measure,
        device=torch.device(device),
        machine=here,
        seconds=0.3 if quick else seconds,
        min_rounds=3 if quick else 5,
        flex=flex,
    )
    wrong = _measure_all(plan, measured, "attention", folder, gpu=here.gpu)
    if folder is not None:
        print((plot_rates if here.gpu else plot).attention(folder))
    _tell_of(wrong)


@bench.command()
def transformers(
    suite: Annotated[str | None, typer.Option(metavar="SUITE,…", help="What to measure.", show_default="all")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE,…", help="Instead of the suite's own.")] = None,
    lengths: Annotated[str | None, typer.Option(metavar="T,T,…", help="Instead of the suite's own.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default one a core.")] = None,
    malloc: Annotated[
        Literal["default", "tuned", "both"],
        typer.Option(help="glibc's own settings, or set to keep freed memory, which helps PyTorch most."),
    ] = "default",
    quick: Annotated[bool, typer.Option("--quick", help="A short prompt and few rounds: a minute, rough.")] = False,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time to spend on a case, at least five rounds.")] = 3.0,
    out: Annotated[Path | None, typer.Option(help="Folder for transformers.jsonl.")] = None,
    record: Annotated[bool, typer.Option("--record", help="The same into benchmarks/results/, by device.")] = False,
) -> None:
    """Measure a model of transformers with attn_implementation="onchip" against "sdpa", on a CPU.

    The model has SmolLM2-135M's shape and random weights, on which the time does not depend. Before it is timed its
    logits must be as close to float64 as those of SDPA, by the rule of the tests. Then both take turns.

    * **prefill**: reading T tokens into a new cache, float32 and bfloat16
    * **step**: one more token, which sees T keys, itself among them
    * **glue**: one layer's call against onchip.attention's own, on one thread: the difference is what the glue takes

    For example: `onchip bench transformers --suite prefill --lengths 2048`
    """
    _one_place(record, out)
    plan = [
        case
        for name in (choices("--suite", suite, MODEL_SUITES) if suite else MODEL_SUITES)
        for case in model_cases(
            name,
            dtypes=choices("--dtype", dtype, DTYPES) if dtype else (),
            lengths=integers("--lengths", lengths) if lengths else (),
            quick=quick,
        )
    ]
    if find_spec("transformers") is None:
        raise Failure("onchip bench transformers needs transformers (pip install 'transformers>=5')")
    if malloc == "both" or dict(os.environ) != machine.environment(malloc):
        raise typer.Exit(_in_fresh_processes(["default", "tuned"] if malloc == "both" else [malloc]))

    import torch

    from onchip.bench.transformers import measure

    torch.set_num_threads(threads or machine.cores())
    here = machine.describe("cpu", malloc)
    folder = _folder(record, out, here)
    measured = functools.partial(measure, machine=here, seconds=0.3 if quick else seconds, min_rounds=3 if quick else 5)
    _tell_of(_measure_all(plan, measured, "transformers", folder))


def _one_place(record: bool, out: Path | None) -> None:
    if record and out is not None:
        raise Failure("--record and --out name two places; give one", exit_code=2)


def _folder(record: bool, out: Path | None, here: machine.Machine) -> Path | None:
    """Where the rows go, if anywhere."""
    folder = _results() / here.slug if record else out
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _measure_all(
    plan: "Sequence[AnyCase]",
    measured: "Callable[[AnyCase], Row]",
    subject: str,
    folder: Path | None,
    *,
    gpu: bool = False,
) -> list[str]:
    """Measure and show the cases, keeping their rows; what was not timed because it was wrong."""
    from onchip.bench import report, rows

    wrong = []
    for name, group in itertools.groupby(report.progress(plan, gpu), key=lambda case: case.suite):
        found = []
        for case in group:
            try:
                found.append(measured(case))
            except ArithmeticError as error:
                wrong.append(str(error))
                continue
            if folder is not None:
                rows.merge(folder / f"{subject}.jsonl", found[-1:])
        report.show(name, found, subject)
    return wrong


def _tell_of(wrong: list[str]) -> None:
    if wrong:
        raise Failure(f"not timed, being wrong: {'; '.join(dict.fromkeys(wrong))}")


def _in_fresh_processes(mallocs: list[machine.Malloc]) -> int:
    """Run this command once for each setting: the allocator and the OpenMP runtime read theirs when they start."""
    codes = []
    for malloc in mallocs:
        command = [sys.executable, "-m", "onchip", *sys.argv[1:], "--malloc", malloc]
        codes.append(subprocess.run(command, env=machine.environment(malloc), check=False).returncode)
    return max(codes, key=abs)


def _results() -> Path:
    """The source tree's, from src/ or a folder in build/."""
    for parent in Path(__file__).parents:
        if (parent / "benchmarks" / "results").is_dir():
            return parent / "benchmarks" / "results"
    raise Failure("--record needs the source tree; --out DIR writes anywhere", exit_code=2)
