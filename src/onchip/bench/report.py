"""What a person sees while a benchmark runs, and when it is done."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from onchip.bench.cases import Case
from onchip.bench.operation_case import OperationCase
from onchip.bench.rows import Row
from onchip.bench.timing import Quartiles

NAMES = {"sdpa": "SDPA", "sdpa_flash": "flash", "sdpa_math": "math", "flex": "flex", "onchip": "onchip",
         "sdpa_efficient": "efficient", "sdpa_cudnn": "cuDNN", "attention": "onchip.attention"}  # fmt: skip
CEILINGS = {"mm": "torch.mm", "read": "read rate", "copy": "copy rate"}
UNITS = {"mm": "TFLOP/s", "read": "GB/s", "copy": "GB/s"}

console = Console()
AnyCase = TypeVar("AnyCase", Case, OperationCase)


def progress(plan: Sequence[AnyCase], gpu: bool = False) -> Iterator[AnyCase]:
    """The cases one by one, with a bar and the time left. It is drawn between cases, never while one is timed."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=sum(_weight(case, gpu) for case in plan))
        for case in plan:
            bar.update(task, description=case.label, refresh=True)
            yield case
            bar.update(task, advance=_weight(case, gpu))


def _weight(case: Case | OperationCase, gpu: bool) -> float:
    """Short cases take the time they are given, long ones what five rounds need; on a GPU all are short."""
    return 1 if gpu else 1 + case.operations / 1e11


def show(suite: str, rows: Sequence[Row], subject: str = "attention") -> None:
    """A table of one suite's rows."""
    if not rows:
        return
    machine, served = rows[0].machine, ", ".join(dict.fromkeys(row.served_by for row in rows))
    columns = list(zip(*(row.case.labels for row in rows), strict=True))
    common = [column[0] for column in columns if len(set(column)) == 1]
    varying = [column for column in columns if len(set(column)) > 1]
    peers = list(dict.fromkeys(name for row in rows for name in (row.ratio or row.extra) if name != "onchip"))
    table = Table(box=box.SIMPLE_HEAD)
    for _ in varying:
        table.add_column(no_wrap=True)
    table.add_column("onchip", justify="right", no_wrap=True)
    if rows[0].of and machine.gpu:
        table.add_column(UNITS[rows[0].of], justify="right")
    if rows[0].of:
        table.add_column(f"of {CEILINGS[rows[0].of]}", justify="right")
    told = list(dict.fromkeys(name for row in rows for name in row.figures))
    for name in told:
        table.add_column(name, justify="right")
    for peer in peers:
        table.add_column(NAMES.get(peer, peer) if rows[0].extra else f"over {NAMES.get(peer, peer)}", justify="right")
    for row, *labels in zip(rows, *varying, strict=True):
        figures = _extra(row, peers) if row.extra else _times(row, peers, told)
        table.add_row(*labels, *figures)
    console.print(f"[bold]{subject}, {suite}[/bold]: {', '.join(common)}", highlight=False)
    setting = (
        f"torch {machine.torch}, triton {machine.triton}, CUDA {machine.cuda}, driver {machine.driver}"
        if machine.gpu
        else f"{machine.threads} threads, malloc {machine.malloc}"
    )
    console.print(f"{machine.name}, {setting}; served by {served}", style="dim")
    console.print(table)


def _extra(row: Row, peers: Sequence[str]) -> list[str]:
    return [f"{row.extra[name]:+.1%}" if name in row.extra else "" for name in ("onchip", *peers)]


def _times(row: Row, peers: Sequence[str], told: Sequence[str]) -> list[str]:
    ratios = [_ratio(row.ratio[peer]) if peer in row.ratio else "" for peer in peers]
    rate = [f"{row.rate['onchip']:.4g}"] if row.of and row.machine.gpu else []
    fraction = [f"{row.fraction['onchip']:.0%}"] if row.of else []
    figures = [f"{row.figures[name]:.4g}" if name in row.figures else "" for name in told]
    return [duration(row.ms["onchip"].median), *rate, *fraction, *figures, *ratios]


def duration(milliseconds: float) -> str:
    """A time, with a unit that suits it.

    >>> duration(0.0123), duration(4.5678)
    ('12.3 µs', '4.568 ms')
    """
    return f"{milliseconds * 1e3:.3g} µs" if milliseconds < 1 else f"{milliseconds:.4g} ms"


def _ratio(values: Quartiles) -> str:
    """The median and half the distance between the quartiles."""
    return f"{values.median:.2f} ±{(values.high - values.low) / 2:.2f}"
