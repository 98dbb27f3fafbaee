"""The `onchip` command. One file per command, thin: what a command does lives in the package.

No command's module imports torch or matplotlib before its command runs, so that `--help` answers at once.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

import onchip
from onchip.cli import bench_operations, errors
from onchip.cli.bench import bench
from onchip.cli.explain import explain
from onchip.cli.generate import generate
from onchip.cli.show import show
from onchip.cli.train import train
from onchip.cli.tune import tune

app = typer.Typer(
    name="onchip",
    help="Exact, IO-aware operations and models for long sequences: train, sample, look inside, measure.",
    epilog="Set ONCHIP_TRACEBACK=1 to see where an error came from.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for _command in (train, generate, show):
    app.command()(_command)
bench_operations.add_to(bench)
app.add_typer(bench)
app.add_typer(explain)
app.add_typer(tune)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"onchip {onchip.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed while running, 2 bad input, 130 interrupted."""
    # Threads that wait for work sleep instead of spinning. The OpenMP runtime reads this once, when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    warnings.showwarning = _show_warning  # one line each, too
    try:
        sys.exit(app(arguments, prog_name="onchip", standalone_mode=False) or 0)
    except TyperException as error:
        _fail(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except errors.EXPECTED as error:
        if "ONCHIP_TRACEBACK" in os.environ:
            raise
        _fail(errors.one_line(error), errors.exit_code(error))


def _fail(message: str, exit_code: int) -> NoReturn:
    if message:
        print(f"onchip: {message}", file=sys.stderr)
    sys.exit(exit_code)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"onchip: warning: {message}", file=sys.stderr)
