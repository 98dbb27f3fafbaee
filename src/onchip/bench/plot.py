"""Attention's figures as a picture: speed relative to PyTorch's, and how near the machine's limit."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onchip._files import atomic_write
from onchip.bench.rows import Row, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = {"forward": "forward", "backward": "forward + backward", "bf16": "bfloat16, forward + backward"}
BARS = ("window", "decode", "overhead")
COLORS = {False: "#3b6fb6", True: "#d1582f"}  # full, causal
GREY = "#8a8a8a"


def attention(folder: Path) -> Path:
    """Draw the rows in `folder/attention.jsonl` as `folder/attention.png`, a line of panels for each malloc setting."""
    from matplotlib.figure import Figure

    rows = [row for row in read(folder / "attention.jsonl") if row.ratio]
    mallocs = sorted({row.machine.malloc for row in rows}) or ["default"]
    suites = [suite for suite in CURVES if any(row.case.suite == suite for row in rows)]
    has_bars = any(row.case.suite in BARS for row in rows)
    columns = max(1, len(suites) + has_bars)
    figure = Figure(figsize=(1.2 + 4.2 * columns, 0.9 + 3.4 * len(mallocs)), layout="constrained")
    panels = figure.subplots(len(mallocs), columns, squeeze=False)
    for line, malloc in zip(panels, mallocs, strict=True):
        here = [row for row in rows if row.machine.malloc == malloc]
        for panel, suite in zip(line, suites, strict=False):
            shown = [row for row in here if row.case.suite == suite]
            _curves(panel, shown)
            panel.set_title(CURVES[suite], fontsize=10, loc="left")
            panel.set_visible(bool(shown))
        if has_bars:
            shown = [row for row in here if row.case.suite in BARS]
            _bars(line[-1], shown)
            line[-1].set_title("other work", fontsize=10, loc="left")
            line[-1].set_visible(bool(shown))
        line[0].set_ylabel(f"malloc {malloc}\nspeed, PyTorch = 1")
    if rows:
        machine, threads = rows[0].machine, max(row.machine.threads for row in rows)
        figure.suptitle(
            f"onchip.attention against PyTorch's fastest: {machine.name}, {threads} threads,"
            f" torch {machine.torch}; line: median, band: quartiles",
            fontsize=11, x=0.01, ha="left",
        )  # fmt: skip
    path = folder / "attention.png"
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return path


def _curves(panel: "Axes", rows: Sequence[Row]) -> None:
    """Ratio over the length, a line for each mask and head dim."""
    for causal, head_dim in sorted({(row.case.causal, row.case.head_dim) for row in rows}):
        line = [row for row in rows if (row.case.causal, row.case.head_dim) == (causal, head_dim)]
        line.sort(key=lambda row: row.case.q_len)
        lengths = [row.case.q_len for row in line]
        low, median, high = zip(*(next(iter(row.ratio.values())) for row in line), strict=True)
        color, style = COLORS[causal], "-" if head_dim <= 64 else "--"
        label = f"{'causal' if causal else 'full'}, D {head_dim}"
        panel.fill_between(lengths, low, high, color=color, alpha=0.15, linewidth=0)
        panel.plot(lengths, median, color=color, linestyle=style, marker="o", markersize=4, label=label)
    panel.axhline(1, color=GREY, linewidth=1)
    panel.set_xscale("log", base=2)
    lengths = sorted({row.case.q_len for row in rows})
    panel.set_xticks(lengths, [str(length) for length in lengths])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.set_xlabel("sequence length T")
    if rows:
        panel.legend(frameon=False, fontsize=8)
    _bare(panel)


def _bars(panel: "Axes", rows: Sequence[Row]) -> None:
    """One bar for each case and peer."""
    names = {"sdpa": "SDPA", "sdpa_flash": "SDPA", "flex": "flex"}
    bars = [
        (f"{_title(row)}\nover {names[peer]}", values)
        for row in rows
        for peer, values in row.ratio.items()
        if peer in names
    ]
    for y, (_, values) in enumerate(bars):
        panel.barh(y, values.median, height=0.55, color=COLORS[False])
        panel.plot([values.low, values.high], [y, y], color="black", linewidth=1)
        panel.text(values.high, y, f"  {values.median:.2g}×", va="center", fontsize=8)
    panel.axvline(1, color=GREY, linewidth=1)
    panel.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=7)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.set_xlim(left=0)
    _bare(panel)


def _title(row: Row) -> str:
    case = row.case
    if case.suite == "window":
        return f"window {case.window}, D {case.head_dim}, {'both passes' if case.grad else 'forward'}"
    if case.suite == "decode":
        return f"decode, Tk {case.k_len}, {case.dtype}"
    return f"tiny call, {case.dtype}"


def _bare(panel: "Axes") -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(length=3, labelsize=8)
