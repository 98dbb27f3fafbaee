"""Attention's figures on a GPU as a picture: operations a second over the length, a line for each implementation."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onchip._files import atomic_write
from onchip.bench.plot import GREY
from onchip.bench.report import NAMES
from onchip.bench.rows import Row, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUITES = ("forward", "backward")
COLORS = {"onchip": "#3b6fb6", "sdpa_flash": "#d1582f", "sdpa_cudnn": "#5a9a4c", "sdpa_efficient": "#9467a8",
          "sdpa_math": "#b09a30", "flex": "#4ba3a8"}  # fmt: skip


def attention(folder: Path) -> Path:
    """Draw the rows in `folder/attention.jsonl` as `folder/attention.png`: passes and masks across, head dims down."""
    from matplotlib.figure import Figure

    rows = [row for row in read(folder / "attention.jsonl") if row.case.suite in SUITES]
    head_dims = sorted({row.case.head_dim for row in rows}) or [64]
    columns = [(suite, causal) for suite in SUITES for causal in (False, True)]
    figure = Figure(figsize=(15, 0.9 + 3.2 * len(head_dims)), layout="constrained")
    panels = figure.subplots(len(head_dims), len(columns), squeeze=False)
    for line, head_dim in zip(panels, head_dims, strict=True):
        for panel, (suite, causal) in zip(line, columns, strict=True):
            of = (suite, causal, head_dim)
            _curves(panel, [row for row in rows if (row.case.suite, row.case.causal, row.case.head_dim) == of])
            panel.set_title(f"{suite}, {'causal' if causal else 'full'}, D {head_dim}", fontsize=10, loc="left")
        line[0].set_ylabel("TFLOP/s")
    lines = {line.get_label(): line for panel in panels.flat for line in panel.get_lines()}
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=len(COLORS) + 1, frameon=False)
    if rows:
        machine, dtypes = rows[0].machine, ", ".join(sorted({row.case.dtype for row in rows}))
        figure.suptitle(
            f"onchip.attention and PyTorch's: {machine.name}, {dtypes}, torch {machine.torch}, triton {machine.triton};"
            " line: median, band: quartiles",
            fontsize=11, x=0.01, ha="left",
        )  # fmt: skip
    path = folder / "attention.png"
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return path


def _curves(panel: "Axes", rows: Sequence[Row]) -> None:
    rows = sorted(rows, key=lambda row: row.case.q_len)
    panel.set_visible(bool(rows))
    for name, color in COLORS.items():
        line = [row for row in rows if name in row.rate]
        if line:
            lengths = [row.case.q_len for row in line]
            work = [row.rate[name] * row.ms[name].median for row in line]
            slow, fast = ([w / row.ms[name][i] for w, row in zip(work, line, strict=True)] for i in (2, 0))
            panel.fill_between(lengths, slow, fast, color=color, alpha=0.2, linewidth=0)
            panel.plot(lengths, [row.rate[name] for row in line], "o-", color=color, markersize=4, label=NAMES[name])
    lengths = [row.case.q_len for row in rows]
    panel.plot(lengths, [row.rate["mm"] for row in rows], color=GREY, linewidth=1, label="torch.mm")
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [str(length) for length in lengths])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.set_xlabel("sequence length T")
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(length=3, labelsize=8)
