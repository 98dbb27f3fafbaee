"""FlashAttention-2 (Dao 2023, arXiv 2307.08691, §4.1): attention near the speed of a matrix product.

The paper claims, on an A100, whose matrix units peak at 312 TFLOP/s:
  1. The forward pass reaches up to 73 % of that.
  2. The backward pass reaches up to 63 %.
  3. A causal mask, which leaves half of the work, lets blocks be skipped: 1.7 to 1.8 times as fast (§3.1.1).

Here each is measured for `onchip.attention` on this machine, and passes or fails by itself. No program reaches the peak
that a machine has on paper, so the fraction is of what torch.mm reaches in the same dtype in the same rounds: less,
which makes claims 1 and 2 that much easier to meet. Operations count as in the paper: 4·T²·D for each head forward,
half where causal, and 2.5 times that backward, whatever a kernel recomputes. The backward pass is timed by itself.
float32 on a CPU, bfloat16 on a GPU.

    python reproductions/flashattention2.py             about five minutes on a CPU
    python reproductions/flashattention2.py --quick     short sequences: it runs, and says little
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onchip.bench import machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from onchip.bench.cases import Case, Device
    from onchip.bench.timing import Quartiles

PUBLISHED = {"forward": 0.73, "backward": 0.63}
SPEEDUP = 1.7  # of causal over full, the lower end of what was published
PANELS = (("forward", False), ("forward", True), ("backward", False), ("backward", True))
COLORS = {False: "#3b6fb6", True: "#d1582f"}  # full, causal


@dataclass(frozen=True)
class Finding:
    """A claim and what became of it."""

    claim: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class Length:
    """What was measured at one length: fractions of torch.mm's rate, and full's time over causal's, by pass."""

    length: int
    fraction: Mapping[tuple[str, bool], "Quartiles"]
    speedup: Mapping[str, "Quartiles"]


def main(
    out: Annotated[Path, typer.Option(help="Folder for the plot.")] = Path("runs/reproductions"),
    quick: Annotated[bool, typer.Option("--quick", help="Short sequences.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Not on the GPU, where there is one.")] = False,
) -> None:
    """Measure the claims of FlashAttention-2 on this machine. Exit code 0 if all hold, else 1."""
    if dict(os.environ) != machine.environment("tuned"):
        os.execve(sys.executable, [sys.executable, *sys.argv], machine.environment("tuned"))
    import torch
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(machine.cores())
    device: Device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    lengths = (128, 256) if quick else (512, 1024, 2048, 4096) if device == "cpu" else (1024, 2048, 4096, 8192, 16384)
    seconds = 0.5 if quick else 60.0 if device == "cpu" else 5.0
    found = [measure(length, device, seconds) for length in lengths]
    findings = [near_the_product(found, "forward"), near_the_product(found, "backward"), causal_costs_half(found)]

    console = Console()
    figures = Table("T", *(f"{name}, {'causal' if causal else 'full'}" for name, causal in PANELS), "full over causal")
    for at in found:
        fractions = [f"{at.fraction[panel].median:.0%}" for panel in PANELS]
        figures.add_row(str(at.length), *fractions, ", ".join(f"{at.speedup[name].median:.2f}" for name in PUBLISHED))
    verdicts = Table("claim", "measured here", "")
    for finding in findings:
        verdicts.add_row(finding.claim, finding.measured, "[green]PASS" if finding.holds else "[red]FAIL")
    console.print(
        "Fractions of torch.mm's rate, and full's time over causal's, forward and backward", figures, verdicts
    )
    print(draw(found, machine.describe(device, "tuned").name, out))
    raise typer.Exit(0 if all(finding.holds for finding in findings) else 1)


def case(length: int, device: "Device", name: str, causal: bool) -> "Case":
    """The paper's case on a GPU: 16,384 tokens in all, 16 heads of 128. On a CPU one sequence, 4 heads."""
    from onchip.bench.cases import Case

    cpu = device == "cpu"
    heads, batch = (4, 1) if cpu else (16, max(1, 16384 // length))
    forward = Case("forward", "float32" if cpu else "bfloat16", heads, heads, length, length, 128, causal, batch=batch)
    return replace(forward, grad=True, alone=True) if name == "backward" else forward


def measure(length: int, device: "Device", seconds: float) -> Length:
    """Both passes, full and causal, and torch.mm, in turns."""
    import torch

    from onchip.bench.attention import ceiling_of, contender
    from onchip.bench.timing import Candidate, interleave, ratio

    here = torch.device(device)
    cases = {panel: case(length, device, *panel) for panel in PANELS}
    product = ceiling_of(cases[PANELS[0]], here)
    runners = {str(panel): Candidate(contender("onchip", of, here).call) for panel, of in cases.items()}
    times = interleave(runners | {"mm": product.candidate}, here, seconds=seconds, min_rounds=5)
    fraction = {}
    for panel, of in cases.items():
        work = of.operations / product.work
        fraction[panel] = scaled(ratio(times["mm"], times[str(panel)]), work)
    speedup = {name: ratio(times[str((name, False))], times[str((name, True))]) for name in PUBLISHED}
    return Length(length, fraction, speedup)


def scaled(values: "Quartiles", factor: float) -> "Quartiles":
    """`values` times `factor`."""
    return type(values)(*(factor * x for x in values))


def near_the_product(found: Sequence[Length], name: str) -> Finding:
    """Whether full attention reaches the published fraction at the length that suits it best, as in the paper."""
    best = max(found, key=lambda at: at.fraction[name, False].median)
    reached = best.fraction[name, False].median
    return Finding(
        f"the {name} pass reaches {PUBLISHED[name]:.0%} of a matrix product",
        f"{reached:.0%} at T {best.length}",
        reached >= PUBLISHED[name],
    )


def causal_costs_half(found: Sequence[Length]) -> Finding:
    """Whether a causal mask saves what was published at the longest length, in both passes."""
    last = found[-1]
    gains = [last.speedup[name].median for name in PUBLISHED]
    return Finding(
        f"causal is {SPEEDUP} to 1.8 times as fast as full, having half the work",
        f"{gains[0]:.2f} times forward, {gains[1]:.2f} backward, at T {last.length}",
        min(gains) >= SPEEDUP,
    )


def draw(found: Sequence[Length], name: str, out: Path) -> Path:
    """Fractions of torch.mm's rate over T, a panel a pass, and the gain of a causal mask."""
    from matplotlib.figure import Figure

    lengths = [at.length for at in found]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, (of, published) in zip(panels, PUBLISHED.items(), strict=False):
        for causal, color in COLORS.items():
            label = "causal" if causal else "full"
            _line(panel, lengths, [at.fraction[of, causal] for at in found], color, label)
        panel.axhline(published, color="#8a8a8a", linewidth=1, linestyle="--")
        panel.annotate(
            "published, of an A100's peak", (lengths[0], published), xytext=(0, 3), fontsize=8,
            textcoords="offset points",
        )  # fmt: skip
        panel.set_ylabel(f"{of}, torch.mm = 1")
    for of, color in zip(PUBLISHED, ("#5a9a4c", "#9467a8"), strict=True):
        _line(panels[2], lengths, [at.speedup[of] for at in found], color, of)
    panels[2].axhspan(SPEEDUP, 1.8, color="#8a8a8a", alpha=0.2, linewidth=0)
    panels[2].set_ylabel("speed of causal, full = 1")
    for panel in panels:
        _bare(panel, lengths)
    figure.suptitle(f"FlashAttention-2's claims, measured on {name}", fontsize=11)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "flashattention2.png"
    figure.savefig(path, dpi=130)
    return path


def _line(panel: "Axes", lengths: Sequence[int], values: Sequence["Quartiles"], color: str, label: str) -> None:
    low, median, high = zip(*values, strict=True)
    panel.fill_between(lengths, low, high, color=color, alpha=0.2, linewidth=0)
    panel.plot(lengths, median, "o-", color=color, label=label)


def _bare(panel: "Axes", lengths: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [str(length) for length in lengths])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.set_xlabel("sequence length T")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    typer.run(main)
