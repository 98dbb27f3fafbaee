"""The loss curve of a run, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onchip._files import atomic_write

_INK, _FAINT, _ACCENT = "#1f2933", "#9fb3c8", "#d64545"


def draw_curve(path: Path, lines: Sequence[Mapping[str, Any]], final: float, rivals: Mapping[str, float]) -> None:
    """Draw the metrics `lines` of a run to `path`: the loss of each step, smoothed too, and the held-out text's.

    `final` is the bits per byte of all held-out text at the end, `rivals` what compressors need for it: levels.
    Raises `ImportError` where matplotlib is missing.
    """
    from matplotlib.figure import Figure

    tokens = np.array([line["tokens"] for line in lines])
    losses = np.array([line["loss"] for line in lines]) / math.log(2)
    looks = [(line["tokens"], line["validation_bits_per_byte"]) for line in lines if "validation_bits_per_byte" in line]

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(tokens, losses, color=_FAINT, linewidth=0.6, alpha=0.45, label="training, each step")
    axes.plot(tokens, _smooth(losses), color=_INK, linewidth=1.6, label="training, smoothed")
    if looks:
        axes.plot(*zip(*looks, strict=True), "o-", color=_ACCENT, markersize=4, linewidth=1, label="held out, a part")
    axes.plot(
        tokens[-1:], [final], "*", color=_ACCENT, markersize=13, label=f"held out, all of it: {final:.2f}", zorder=5
    )

    for name, level in rivals.items():
        axes.axhline(level, color=_INK, linewidth=0.8, linestyle=(0, (6, 4)))
        axes.annotate(
            f"{name}: {level:.2f}",
            (0, level),
            xycoords=("axes fraction", "data"),
            xytext=(6, 3),
            textcoords="offset points",
            fontsize=9,
            color=_INK,
        )
    levels = [final, losses.min(), losses.max(), *rivals.values()]
    axes.set_ylim(max(0, min(levels) - 0.25), max(levels) + 0.1)
    axes.set_xlim(0, tokens[-1] * 1.02)
    axes.set_xlabel("tokens learnt from")
    axes.set_ylabel("bits per byte")
    axes.xaxis.set_major_formatter(_count)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_FAINT, alpha=0.3)
    axes.legend(frameon=False, loc="upper right", fontsize=9)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over a window of a fiftieth of the run around each value; shorter at the ends, never beside the data."""
    reach = max(1, len(values) // 100)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))


def _count(value: float, position: float = 0) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g} {name}"
    return f"{value:g}"
