"""What a finished run is worth, in figures, in a picture and in words."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from onchip.generation import generate
from onchip.training.checkpoint import write_json
from onchip.training.curve import draw_curve
from onchip.training.evaluation import compressed_bits_per_byte
from onchip.training.loop import Trainer
from onchip.training.metrics import read_metrics
from onchip.training.run import RunFolder


def make_report(trainer: Trainer) -> dict[str, Any] | None:
    """Judge the model of a finished run by all of its held-out text, next to what compressors make of the same bytes.

    Every process takes part in the evaluation; the first gets the report, the others None. Cost: one forward pass over
    the held-out text.
    """
    config, held_out = trainer.config, trainer.corpus.held_out
    bits = {"model": trainer.evaluate()}
    if not trainer.processes.first:
        return None
    bits |= compressed_bits_per_byte(held_out)
    lines = read_metrics(trainer.folder.metrics)
    seconds = sum(config.tokens_per_step / line["tokens_per_second"] for line in lines)
    # No longer than the windows it learnt from: beyond, it has never seen a position.
    (sample,) = generate(
        trainer.model,
        [""],
        max_new_tokens=min(500, config.context),
        temperature=0.8,
        seed=config.seed,
        tokenizer=trainer.tokenizer,
    )
    return {
        "bits_per_byte": bits,
        "held_out_files": [document.name for document in held_out],
        "held_out_bytes": sum(len(document.data) for document in held_out),
        "parameters": trainer.model.num_parameters,
        "steps": config.steps,
        "tokens": config.steps * config.tokens_per_step,
        "training_seconds": round(seconds, 1),
        "sample": sample.text,
    }


def read_report(folder: RunFolder) -> dict[str, Any] | None:
    """The report written into `folder`, None where there is none. Raises `ValueError` where it is damaged."""
    if not folder.report.exists():
        return None
    try:
        return dict(json.loads(folder.report.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder.report} is damaged: {error}") from None


def write_report(folder: RunFolder, report: dict[str, Any]) -> None:
    """Write `report.json` and, where matplotlib is installed, the loss curve."""
    figures = dict(report["bits_per_byte"])
    with suppress(ImportError):
        draw_curve(folder.curve, read_metrics(folder.metrics), figures.pop("model"), figures)
    write_json(folder.report, report)


def describe(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    figures = report["bits_per_byte"]
    ours = figures["model"]
    rows = "\n".join(f"  {'this model' if name == 'model' else name:<12}{value:.3f}" for name, value in figures.items())
    beaten = [name for name, value in figures.items() if name != "model" and ours < value]
    verdict = (
        f"The model predicts it better than {' and '.join(beaten)}." if beaten else "Both compressors are ahead yet."
    )
    return f"{report['held_out_bytes']:,} bytes of held-out text, bits per byte (fewer is better):\n{rows}\n{verdict}"
