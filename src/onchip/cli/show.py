"""`onchip show`: what the layers and heads of a model mix, as a picture."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from onchip.cli import inputs
from onchip.cli.errors import Failure

_TEXT = "def add(a, b):\n    return a + b\n"


def show(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run's folder, or any with config.json and model.safetensors.")
    ],
    text: Annotated[
        str, typer.Option(metavar="TEXT", help="What the model reads.", show_default="two lines of Python")
    ] = _TEXT,
    file: Annotated[
        str | None, typer.Option(metavar="FILE", help="The same from a file, - for standard input.")
    ] = None,
    length: Annotated[
        int, typer.Option(min=1, help="Bytes of it to read at most; the picture has their square.")
    ] = 256,
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Where the picture goes.", show_default="DIR/mixing.png")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU where there is one.", show_default=False)
    ] = None,
) -> None:
    """Draw the mixing matrices of every layer of the model in DIR on a text, as one PNG.

    A sequence mixer applies a T×T matrix to the sequence: row i says how much token i draws on each token before it.
    Look for diagonals (a head that looks a fixed distance back), columns (a token that many others read: a newline, a
    bracket) and stripes that appear where the text repeats itself. Of a state space each channel (Mamba) or head
    (Mamba-2) has such a matrix, too: at most eight are drawn, from the one that looks back least to the one that looks
    furthest.

    For example: `onchip show runs/demo --text "for i in range(10): print(i)"`
    """
    data = text.encode(errors="surrogateescape") if file is None else inputs.read(file)
    if len(data) > length:
        print(f"onchip: the first {length} of {len(data)} bytes are drawn; --length takes more", file=sys.stderr)

    from onchip.models import load_model
    from onchip.training.devices import choose_device
    from onchip.viz import draw_mixing_matrices

    picture = folder / "mixing.png" if out is None else out
    model = load_model(folder, choose_device(device))
    try:
        draw_mixing_matrices(model, data[:length], picture)
    except ImportError as error:
        raise Failure(str(error)) from None
    print(picture)
