"""`onchip tune`: faster tile shapes for the GPU at hand."""

from typing import TYPE_CHECKING, Annotated

import typer

from onchip.cli.errors import Failure
from onchip.cli.values import choices

if TYPE_CHECKING:
    from onchip.ops.attention.triton.blocks import Pass

tune = typer.Typer(
    name="tune",
    help="Time the tile shapes of a GPU's kernels and print the table for the source. Changes nothing.",
    no_args_is_help=True,
)

PASSES: tuple["Pass", ...] = ("forward", "decode", "keys", "queries", "bias")
HEAD_DIMS = ("64", "128", "256")


@tune.callback()
def _group() -> None:
    pass


@tune.command()
def attention(
    passes: Annotated[str, typer.Option(metavar="PASS,…", help="Which kernels.")] = ",".join(PASSES),
    head_dims: Annotated[str, typer.Option(metavar="D,…", help="For which heads.")] = ",".join(HEAD_DIMS),
    float32: Annotated[bool, typer.Option("--float32", help="The table of float32; by default bfloat16's.")] = False,
) -> None:
    """Time the neighbours of each entry of onchip/ops/attention/triton/blocks.py on this GPU, and print a better table.

    From an entry it goes to the fastest of the shapes with rows or keys halved or doubled, 4 or 8 warps, a stage more
    or less, for as long as that saves 2 %. Shapes that do not compile or do not fit are passed over. Most of
    the time goes into compiling. The shapes are of a line's first columns; those of "bias", whose logits have terms, of
    its last.

    The lines printed go into blocks.py; `make budgets` and `make test-gpu` then say whether they hold.

    For example: `onchip tune attention --passes forward,keys --head-dims 64,128`
    """
    chosen = choices("--passes", passes, PASSES)
    dims = [int(dim) for dim in choices("--head-dims", head_dims, HEAD_DIMS)]

    import torch

    from onchip.ops import _triton

    if not torch.cuda.is_available():
        raise Failure("tune needs a GPU, and PyTorch finds none here", exit_code=2)
    device = torch.device("cuda")
    reason = _triton.limits(device)
    if reason is not None:
        raise Failure(f"tune cannot run here: {reason}", exit_code=2)

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from onchip.bench.tune import Entry, descend, table

    console = Console(highlight=False, markup=False, soft_wrap=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    entries = [Entry(of, dim, float32) for of in chosen for dim in dims]
    found = {}
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=len(entries))
        for entry in entries:
            timer = entry.timer(device, lambda what: bar.update(task, description=what, refresh=True))
            found[entry], seconds = descend(entry.start(device), timer)
            console.print(f"{entry}: {found[entry]}, {1e3 * seconds:.4g} ms")
            bar.update(task, advance=1, refresh=True)
    console.print(f"\n{torch.cuda.get_device_name()}, {_triton.architecture(device)}:\n{table(found)}")
