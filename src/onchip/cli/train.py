"""`onchip train`: text in, a language model out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from onchip.cli.errors import Failure

if TYPE_CHECKING:
    from onchip.data import Tokenizer
    from onchip.models import LanguageModel
    from onchip.training import RunFolder, TrainConfig, Trainer


def train(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The run's folder.")],
    corpus: Annotated[
        list[str] | None,
        typer.Argument(metavar="CORPUS", help="Files, folders or quoted globs of text; any bytes are valid text."),
    ] = None,
    preset: Annotated[
        Literal["tiny", "demo", "small", "attention", "mamba", "mamba2", "hybrid"] | None,
        typer.Option(
            help="tiny: seconds. demo: about 5 minutes on two cores (a new run's default). small: half an hour. "
            "attention, mamba, mamba2, hybrid (Mamba-2 and some attention): demo's size and text, to compare."
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A model of your own, as config.json of a run describes one.")
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Begin with the model in DIR, one of transformers' too, and its tokenizer; --lr is then 1e-4.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; warm-up and decay stretch along.")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows of text per step, over all processes.")] = None,
    context: Annotated[int | None, typer.Option(help="Bytes per window.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Parts to compute a batch in, to save memory.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and of the order of the text.")] = None,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"] | None,
        typer.Option(help="Of matrix products; auto: bfloat16 where the device computes it natively."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU where there is one.")
    ] = None,
) -> None:
    """Train a byte-level language model on text, or --init-from one with a tokenizer, and say what it is worth.

    Without CORPUS it learns the Python standard library's own source. About 5 % of the text is held out, by whole
    files, and the model is judged by it: how many bits it would need to store each byte, next to gzip -9 and xz -9.

    DIR receives the model (for `onchip generate DIR` and `onchip show DIR`), the settings, a line of metrics per step,
    checkpoints, and at the end a report, a loss curve and a sample.

    Ctrl-C finishes the step and writes a checkpoint; the same command, or `onchip train --out DIR` alone, goes on from
    there and ends with exactly the weights of an uninterrupted run. A run with other settings is never overwritten.

        onchip train --preset demo --out demo
        onchip train --preset mamba2 --out runs/mamba2
        onchip train ~/notes 'books/*.txt' --out runs/mine --steps 2000
        onchip train ~/notes --init-from SmolLM2-135M --out runs/tuned --steps 200
        torchrun --nproc-per-node 2 --no-python onchip train --preset small --out runs/two
    """
    from contextlib import ExitStack

    from onchip.data import Corpus, PretrainedTokenizer
    from onchip.models import read_config
    from onchip.training import PRESETS, Request, RunFolder, Trainer
    from onchip.training.devices import choose_device, compute_deterministically, keep_freed_memory
    from onchip.training.distributed import joined
    from onchip.training.run import absolute

    if init_from is not None and model is not None:
        raise Failure("--model and --init-from exclude each other: the model is the one in the folder", exit_code=2)
    compute_on = choose_device(device)
    compute_deterministically(compute_on)
    keep_freed_memory()
    folder = RunFolder(out)
    with ExitStack() as stack:
        processes = stack.enter_context(joined(compute_on))
        if processes.first:
            stack.enter_context(folder.claimed())
        processes.wait()
        before = folder.request()
        base = before.config if before and not preset else PRESETS[preset or "demo"]
        given: dict[str, Any] = {
            "batch": batch, "context": context, "lr": lr, "accumulate": accumulate, "seed": seed, "precision": precision
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        begun = str(init_from.absolute()) if init_from else before.init_from if before else None
        if init_from is not None:
            given = {"model": read_config(init_from), **({"lr": 1e-4} if preset or not before else {}), **given}
        config = _configured(base, steps, model, given)
        sources = before.sources if before and not corpus else absolute(corpus or ())
        text = Corpus.read(sources)
        request = Request(config, sources, text.fingerprint, begun)
        folder.check(request)
        tokenizer, start = _beginning(folder, begun, config.model.vocab_size)
        trainer = Trainer(
            config, text, folder, device=compute_on, processes=processes, tokenizer=tokenizer, start=start
        )
        if processes.first:
            folder.begin(request)
            if isinstance(tokenizer, PretrainedTokenizer):
                tokenizer.save(folder.path)
        _train(trainer)


def _beginning(folder: "RunFolder", begun: str | None, vocab_size: int) -> tuple["Tokenizer", "LanguageModel | None"]:
    """The run's tokenizer, and the model it begins with; a run that has a checkpoint needs none."""
    from onchip.data import load_tokenizer
    from onchip.models import load_model
    from onchip.training.checkpoint import checkpoints

    own = begun is None or (folder.path / "tokenizer.json").exists()
    tokenizer = load_tokenizer(folder.path if own else str(begun), vocab_size)
    return tokenizer, None if begun is None or checkpoints(folder.checkpoints) else load_model(begun)


def _configured(base: "TrainConfig", steps: int | None, model: Path | None, given: dict[str, Any]) -> "TrainConfig":
    import dataclasses
    import json

    from onchip.models import ModelConfig

    if model is not None:
        try:
            given["model"] = ModelConfig.from_dict(json.loads(model.read_bytes()))
        except ValueError as error:
            raise Failure(f"{model}: {error}", exit_code=2) from None
    config = dataclasses.replace(base, **given)
    return config if steps is None else config.lasting(steps)


def _header(trainer: "Trainer") -> str:
    import torch

    config, count = trainer.config, trainer.processes.count
    mixers = ", ".join(dict.fromkeys(layer["mixer"] for layer in config.model.layers))
    layers, parameters = len(config.model.layers), trainer.model.num_parameters
    precision = "bfloat16" if trainer.bfloat16 else "float32"
    if config.precision == "auto" and not trainer.bfloat16:
        precision += " (no native bfloat16 here)"
    processes = f", {count} processes" if count > 1 else ""
    resumed = f", going on after step {trainer.step}" if trainer.step else ""
    return (
        f"model   {parameters:,} parameters: {layers} layers ({mixers}), d_model {config.model.d_model}\n"
        f"corpus  {trainer.corpus}\n"
        f"run     {config.steps:,} steps of {config.batch} × {config.context} tokens, {precision}, "
        f"{trainer.device}, {torch.get_num_threads()} threads{processes}\n"
        f"folder  {trainer.folder.path}{resumed}\n"
    )


def _train(trainer: "Trainer") -> None:
    from rich.console import Console

    from onchip.training.progress import display
    from onchip.training.report import describe, make_report, read_report, write_report
    from onchip.training.run import resume_command

    console = Console(quiet=not trainer.processes.first, highlight=False, markup=False, soft_wrap=True)
    console.print(_header(trainer))
    if not trainer.finished:
        stopped = trainer.train(display(console, trainer.config.steps, trainer.step))
        if stopped is not None:
            console.print(f"Stopped after step {trainer.step}. Go on with: {resume_command(trainer.folder.path)}")
            raise typer.Exit(128 + stopped)
    report = read_report(trainer.folder)
    if report is None:
        console.print("\nJudging the model by all of the held-out text …")
        report = make_report(trainer)
        if report is None:  # not the first of several processes
            return
        write_report(trainer.folder, report)
    console.print(f"\n{describe(report)}\n")
    console.print(f"A new document, as the model writes it:\n\n{_printable(report['sample'])}\n")
    console.print(_afterwards(trainer.folder))


def _printable(text: str) -> str:
    """`text` without what would steer the terminal."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def _afterwards(folder: "RunFolder") -> str:
    curve = f"{folder.curve}" if folder.curve.exists() else "none: it needs matplotlib (pip install 'onchip[plot]')"
    return (
        f"loss curve  {curve}\n"
        f"report      {folder.report}\n"
        f"more text   onchip generate {folder.path} --prompt 'def '\n"
        f"look inside onchip show {folder.path}\n"
        f"your text   onchip train FILES --out DIR; --preset small learns for half an hour"
    )
