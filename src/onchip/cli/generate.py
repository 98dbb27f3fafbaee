"""`onchip generate`: text from a trained model, as it comes."""

import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onchip.cli import inputs

if TYPE_CHECKING:
    from onchip.generation import Piece


def generate(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run's folder, or any with config.json and model.safetensors.")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="How a document begins. May be given several times.")
    ] = None,
    prompt_file: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="The same from a file, - for standard input.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Continuations of each prompt.")] = 1,
    max_new_tokens: Annotated[
        int, typer.Option(help="Bytes, or tokens where the model has a tokenizer, to write at most.")
    ] = 256,
    temperature: Annotated[float, typer.Option(help="Above 1 bolder, below 1 safer, 0 always the likeliest.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest bytes or tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Only the likeliest bytes that together reach this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Only bytes at least this fraction as likely as the likeliest.")] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text. May be given several times.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same text; by default another.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU where there is one.", show_default=False)
    ] = None,
) -> None:
    """Continue prompts with the model in DIR, and write the text as it comes.

    Without a prompt the model begins a document of its own. All continuations are decoded together; the first is shown
    while it is written, the others when their turn comes. How fast it went is told on standard error.

    For example: `onchip generate runs/demo --prompt "def " --samples 3 --temperature 0.7 --stop $'\\n\\n\\n'`
    """
    prompts = [os.fsencode(text) for text in prompt or []] + [inputs.read(name) for name in prompt_file or []]
    prompts = [text for text in prompts or [b""] for _ in range(samples)]

    import torch

    from onchip.data import ByteTokenizer, load_tokenizer
    from onchip.generation import stream
    from onchip.models import load_model
    from onchip.training.devices import choose_device

    model = load_model(folder, choose_device(device))
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    if model.num_parameters < 10_000_000:
        torch.set_num_threads(1)  # a step is over before a second thread has woken
    start = time.perf_counter()
    pieces = stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop=stop or (),
        seed=seed,
        tokenizer=tokenizer,
    )
    tokens = _write(pieces, prompts)
    seconds = time.perf_counter() - start
    unit = "bytes" if isinstance(tokenizer, ByteTokenizer) else "tokens"
    print(f"{tokens} {unit} in {seconds:.1f} s: {tokens / seconds:.0f} a second", file=sys.stderr)


def _write(pieces: Iterable["Piece"], prompts: Sequence[bytes]) -> int:
    """Show each prompt with its continuation, one after the other; text whose turn has not come waits."""
    waiting: list[list[str]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    turn, tokens = 0, 0
    _begin(turn, prompts)
    for piece in pieces:
        tokens += 1
        waiting[piece.index].append(piece.text)
        finished[piece.index] = piece.finish is not None
        while turn < len(prompts):
            typer.echo(_visible("".join(waiting[turn])), nl=False)
            waiting[turn].clear()
            if not finished[turn]:
                break
            typer.echo()
            turn += 1
            if turn < len(prompts):
                _begin(turn, prompts)
        sys.stdout.flush()
    return tokens


def _begin(turn: int, prompts: Sequence[bytes]) -> None:
    if len(prompts) > 1:
        typer.secho(f"── {turn + 1} of {len(prompts)} ──", dim=True)
    typer.secho(_visible(prompts[turn].decode("utf-8", "replace")), bold=True, nl=False)


def _visible(text: str) -> str:
    """On a terminal, which would obey them, control characters become pictures of themselves."""
    if not sys.stdout.isatty():
        return text
    return "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else c for c in text).replace("\x7f", "␡")
