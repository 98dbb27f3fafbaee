"""The figures of whole Mambas as a picture: what a pass over T tokens costs, and a decoding step after them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onchip._files import atomic_write
from onchip.bench.plot import GREY
from onchip.bench.rows import Row, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {
    "a forward pass": ("forward",),
    "a training step": ("train", "once"),
    "a decoding step after T tokens": ("context",),
}
COLORS = {"onchip": "#3b6fb6", "transformers": "#d1582f", "mambapy": "#5a9a4c", "onchip in transformers": "#4ba3a8"}


def mamba(folder: Path) -> Path:
    """Draw the rows in `folder/mamba.jsonl` as `folder/mamba.png`: milliseconds over T, on logarithmic axes."""
    from matplotlib.figure import Figure

    rows = [row for row in read(folder / "mamba.jsonl") if row.case.dtype == "float32"]
    mallocs = sorted({row.machine.malloc for row in rows}) or ["default"]
    drawn = {
        title: suites for title, suites in PANELS.items() if any(row.case.suite in suites for row in rows)
    } or PANELS
    figure = Figure(figsize=(1.6 + 4 * len(drawn), 0.9 + 3.6 * len(mallocs)), layout="constrained")
    panels = figure.subplots(len(mallocs), len(drawn), squeeze=False)
    for line, malloc in zip(panels, mallocs, strict=True):
        for panel, (title, suites) in zip(line, drawn.items(), strict=True):
            _curves(panel, [row for row in rows if row.machine.malloc == malloc and row.case.suite in suites])
            panel.set_title(title, fontsize=10, loc="left")
        first = next((panel for panel in line if panel.get_visible()), line[0])
        first.set_ylabel(f"malloc {malloc}\nmilliseconds")
    lines = {line.get_label(): line for panel in panels.flat for line in panel.get_lines()}
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=len(COLORS) + 1, frameon=False)
    if rows:
        machine, threads = rows[0].machine, max(row.machine.threads for row in rows)
        figure.suptitle(
            "Mamba (decoding: Mamba-2), 4 layers of 256 features; line: median, band: quartiles\n"
            f"{machine.name}, {threads} threads, torch {machine.torch}",
            fontsize=10, x=0.01, ha="left",
        )  # fmt: skip
    path = folder / "mamba.png"
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return path


def _curves(panel: "Axes", rows: Sequence[Row]) -> None:
    """Time over the length; beside passes a line that grows as T does, and the state's size beside steps."""
    rows = sorted(rows, key=lambda row: row.case["T"])
    panel.set_visible(bool(rows))
    if not rows:
        return
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    for name, color in COLORS.items():
        line = [row for row in rows if name in row.ms]
        if line:
            lengths = [row.case["T"] for row in line]
            low, median, high = zip(*(row.ms[name] for row in line), strict=True)
            panel.fill_between(lengths, low, high, color=color, alpha=0.2, linewidth=0)
            panel.plot(lengths, median, "o-", color=color, markersize=4, label=name)
    lengths = sorted({row.case["T"] for row in rows})
    if sizes := {row.figures["state, KB"] for row in rows if "state, KB" in row.figures}:
        told = f"{min(sizes):,.0f} KB" if len(sizes) == 1 else f"{min(sizes):,.0f} to {max(sizes):,.0f} KB"
        panel.text(0.98, 0.04, f"onchip's state: {told}", transform=panel.transAxes, ha="right", fontsize=8)
        panel.set_ylim(bottom=panel.get_ylim()[0] / 3, top=panel.get_ylim()[1] * 3)
    else:
        first = rows[0].ms["onchip"].median
        proportional = [first * length / lengths[0] for length in lengths]
        panel.plot(lengths, proportional, color=GREY, linewidth=1, linestyle=":", label="in proportion to T")
    panel.set_xticks(lengths, [str(length) for length in lengths])
    panel.minorticks_off()
    panel.set_xlabel("T")
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(length=3, labelsize=8)
