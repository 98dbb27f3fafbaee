"""FlashAttention (Dao et al. 2022, arXiv 2205.14135): exact attention, linear memory, faster than eager attention.

The paper claims of its algorithm, on an A100:
  1. The output is that of standard attention: nothing is approximated (theorem 1).
  2. Memory grows linearly with the sequence length; standard attention's grows quadratically (theorem 1, figure 3).
  3. It is 2 to 4 times faster than standard attention in PyTorch, the more so the longer the sequence.

Here each is measured for `onchip.attention` on this machine, and passes or fails by itself. Standard attention is
PyTorch's unfused path, which writes the T×T logits; both run forward and backward, causal, in float32. Both sides get
an allocator that keeps freed memory, as on a GPU: otherwise page faults would be much of the eager side's time.

    python reproductions/flashattention.py             a minute or two
    python reproductions/flashattention.py --quick     short sequences: the growth shows, the speed hardly
"""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onchip.bench import machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from onchip.bench.cases import Case
    from onchip.bench.timing import Quartiles

PEER = "sdpa_math"
LINEAR = 1.15  # the largest exponent of T that still counts as linear over the lengths measured
PUBLISHED_SPEEDUP = 2.0


@dataclass(frozen=True)
class Finding:
    """A claim and what became of it."""

    claim: str
    measured: str
    holds: bool


def main(
    out: Annotated[Path, typer.Option(help="Folder for the plot.")] = Path("runs/reproductions"),
    quick: Annotated[bool, typer.Option("--quick", help="Short sequences.")] = False,
) -> None:
    """Measure the claims of FlashAttention on this machine. Exit code 0 if all hold, else 1."""
    if dict(os.environ) != machine.environment("tuned"):
        os.execve(sys.executable, [sys.executable, *sys.argv], machine.environment("tuned"))
    import torch
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(machine.cores())
    lengths = [128, 256, 512] if quick else [512, 1024, 2048, 4096]
    memory = {name: [peak_bytes(case(length), name) for length in lengths] for name in ("onchip", PEER)}
    speedups = [speedup(case(length), seconds=0.2 if quick else 3.0) for length in lengths]
    findings = [exactness(lengths[:3]), linear_memory(lengths, memory), growing_speed(lengths, speedups)]

    console = Console()
    figures = Table("T", "memory, onchip", "memory, eager", "speed, eager = 1")
    for length, ours, eager, ratio in zip(lengths, memory["onchip"], memory[PEER], speedups, strict=True):
        figures.add_row(
            str(length), f"{ours / 2**20:.1f} MiB", f"{eager / 2**20:.1f} MiB",
            f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})",
        )  # fmt: skip
    verdicts = Table("claim", "measured here", "")
    for finding in findings:
        verdicts.add_row(finding.claim, finding.measured, "[green]PASS" if finding.holds else "[red]FAIL")
    console.print(figures, verdicts)
    print(draw(lengths, memory, speedups, out))
    raise typer.Exit(0 if all(finding.holds for finding in findings) else 1)


def case(length: int) -> "Case":
    """Both passes of causal attention, as a language model trains with it."""
    from onchip.bench.cases import Case

    return Case("backward", "float32", 4, 4, length, length, 64, causal=True, grad=True)


def exactness(lengths: Sequence[int]) -> Finding:
    """Errors against float64, next to those of eager attention."""
    import torch

    from onchip.bench.attention import contender, errors

    found = [
        error
        for length in lengths
        for error in errors(case(length), *(contender(x, case(length), torch.device("cpu")) for x in ("onchip", PEER)))
    ]
    worst = max(found, key=lambda error: error.ours / error.allowed)
    return Finding(
        "the output and the gradients are those of standard attention",
        f"largest error {worst.ours:.1e}, eager attention's {worst.peer:.1e} ({worst.name})",
        worst.ours <= worst.allowed,
    )


def peak_bytes(of: "Case", name: str) -> float:
    """The peak memory of both passes: inputs, outputs, and all between."""
    import torch

    from onchip.bench import memory

    inputs_and_outputs = 8 * 4 * of.heads * of.q_len * of.head_dim  # q, k, v, out and their gradients, in float32
    return inputs_and_outputs * (1 + memory.extra_in_subprocess(of, name, torch.device("cpu")))


def linear_memory(lengths: Sequence[int], memory: dict[str, list[float]]) -> Finding:
    """The exponents of T in the memory of both."""
    ours, eager = (exponent(lengths, memory[name]) for name in ("onchip", PEER))
    return Finding(
        "memory grows linearly with T, standard attention's quadratically",
        f"as T to the {ours:.2f}; eager attention: to the {eager:.2f}",
        ours <= LINEAR < eager,
    )


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """The slope of the line through the first and the last point, in logarithms."""
    return math.log(values[-1] / values[0]) / math.log(lengths[-1] / lengths[0])


def speedup(of: "Case", seconds: float) -> "Quartiles":
    """Eager attention's time over onchip's, round by round."""
    import torch

    from onchip.bench.attention import contender
    from onchip.bench.timing import Candidate, interleave, ratio

    device = torch.device("cpu")
    runners = {name: contender(name, of, device) for name in ("onchip", PEER)}
    candidates = {name: Candidate(runner.call, runner.scope) for name, runner in runners.items()}
    times = interleave(candidates, device, seconds=seconds, min_rounds=3)
    return ratio(times[PEER], times["onchip"])


def growing_speed(lengths: Sequence[int], speedups: Sequence["Quartiles"]) -> Finding:
    """Whether the longest sequence gains more than the shortest, and as much as was published."""
    first, last = speedups[0].median, speedups[-1].median
    return Finding(
        "2 to 4 times faster than standard attention, the more so the longer T",
        f"{first:.1f}× at T {lengths[0]}, {last:.1f}× at T {lengths[-1]}",
        last > first and last >= PUBLISHED_SPEEDUP,
    )


def draw(lengths: Sequence[int], memory: dict[str, list[float]], speedups: Sequence["Quartiles"], out: Path) -> Path:
    """Memory and speed over T, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label, color in (("onchip", "onchip", "#3b6fb6"), (PEER, "eager", "#d1582f")):
        values = [value / 2**20 for value in memory[name]]
        left.plot(lengths, values, "o-", color=color)
        left.annotate(
            f"{label}: T to the {exponent(lengths, values):.2f}", (lengths[-1], values[-1]), color=color,
            xytext=(-6, 8), textcoords="offset points", ha="right",
        )  # fmt: skip
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter("{x:g}")
    left.margins(y=0.12)
    left.set_ylabel("peak memory, MiB")
    low, median, high = zip(*speedups, strict=True)
    right.fill_between(lengths, low, high, color="#3b6fb6", alpha=0.2, linewidth=0)
    right.plot(lengths, median, "o-", color="#3b6fb6")
    right.axhspan(2, 4, color="#8a8a8a", alpha=0.15, linewidth=0)
    right.annotate("published, A100", (lengths[0], 4), xytext=(0, -11), textcoords="offset points", fontsize=8)
    right.set_ylim(bottom=0)
    right.set_ylabel("speed, eager attention = 1")
    for panel in (left, right):
        _bare(panel, lengths)
    figure.suptitle("FlashAttention's claims, measured on this CPU: both passes, causal, float32", fontsize=11)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "flashattention.png"
    figure.savefig(path, dpi=130)
    return path


def _bare(panel: "Axes", lengths: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [str(length) for length in lengths])
    panel.minorticks_off()
    panel.set_xlabel("sequence length T")
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    typer.run(main)
