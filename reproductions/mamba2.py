"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): a state space model that is a structured attention, and fast as one.

The paper claims:
  1. A state space model with a scalar decay is a semiseparable matrix (§3): the recurrence, the matrix, and products of
     its blocks, chunk by chunk, compute the same (§6).
  2. Computed so, it is 2 to 8 times faster than Mamba's selective scan, and it takes a larger state with little loss
     of speed (figure 10).
  3. It solves multi-query associative recall, which asks for much memory (figure 8).

Here each is measured on this machine, and passes or fails by itself. Speed is that of both operations with the same
channels and states on a CPU, forward and forward with backward, float32; the claim is held to states of 64 and more.
Recall is much smaller than published, which is of up to 1,024 tokens with 256 pairs and a vocabulary of 8,192: it is of
64 tokens with 4 pairs and a vocabulary of 64, learnt from sequences of 16 to 64 tokens by two layers of width 64.
Whether it is learnt hangs on the learning rate more than on anything else (arXiv 2508.19029), so several are tried, and
the best one counts.

    python reproductions/mamba2.py             7 to 10 minutes on two cores
    python reproductions/mamba2.py --quick     a few steps of training, short sequences: it runs, and says little
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onchip.bench import machine

if TYPE_CHECKING:
    from synthetic import Point

    from onchip.bench.timing import Quartiles

EXACT = 1e-10
PUBLISHED_SPEEDUP, LARGE = 2.0, 64  # the least speedup, from this size of the state on
RECALLED = 0.95
CHANNELS, HEAD_DIM = 512, 64
RATES = (3e-3, 1e-2, 2e-2)
LENGTH, PAIRS, VOCAB_SIZE = 64, 4, 64  # of associative recall
PASSES = ("forward", "forward and backward")
COLORS = {"forward": "#3b6fb6", "forward and backward": "#d1582f"}
Speedups = Mapping[str, Mapping[int, "Quartiles"]]
"""How much faster ssd is than the scan, by pass and size of the state."""


@dataclass(frozen=True)
class Finding:
    """A claim and what became of it."""

    claim: str
    measured: str
    holds: bool


def main(
    out: Annotated[Path, typer.Option(help="Folder for the plot.")] = Path("runs/reproductions"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps, short sequences.")] = False,
) -> None:
    """Measure the claims of Mamba-2 on this machine. Exit code 0 if all hold, else 1."""
    if dict(os.environ) != machine.environment("tuned"):
        os.execve(sys.executable, [sys.executable, *sys.argv], machine.environment("tuned"))
    import torch
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(machine.cores())
    error = disagreement(100 if quick else 1000)
    speedups = measure(128, (16, 64), 0.5) if quick else measure(2048, (16, 32, 64, 128, 256), 60.0)
    learned = {rate: learn(4 if quick else 2500, rate) for rate in RATES}
    findings = [duality(error), speed(speedups), recall(learned)]

    console = Console()
    figures = Table("state a channel", *PASSES, title="speed of ssd, selective scan = 1")
    for n in speedups[PASSES[0]]:
        ratios = (speedups[of][n] for of in PASSES)
        figures.add_row(str(n), *(f"{r.median:.2f} ({r.low:.2f}–{r.high:.2f})" for r in ratios))
    rates = Table("learning rate", "recalled", title="associative recall")
    for rate, points in learned.items():
        rates.add_row(f"{rate:g}", f"{points[-1].accuracy:.1%}")
    verdicts = Table("claim", "measured here", "")
    for finding in findings:
        verdicts.add_row(finding.claim, finding.measured, "[green]PASS" if finding.holds else "[red]FAIL")
    console.print(figures, rates, verdicts)
    print(draw(speedups, learned, out))
    raise typer.Exit(0 if all(finding.holds for finding in findings) else 1)


def disagreement(length: int) -> float:
    """How far the forms lie apart at most, in float64: the matrix, the recurrence, and chunks of several sizes."""
    import torch

    import onchip

    torch.manual_seed(0)
    x, dt, A = torch.randn(2, length, 4, 16).double(), torch.rand(2, length, 4).double(), -torch.rand(4).double()
    B, C = torch.randn(2, 2, length, 2, 8).double()
    matrix = torch.einsum("bhij,bjhp->bihp", onchip.ssd_matrix(dt, A, B, C), x)
    state, outputs = torch.zeros(2, 4, 16, 8, dtype=torch.float64), []
    for t in range(length):
        y_t, state = onchip.ssd_step(x[:, t], state, dt[:, t], A, B[:, t], C[:, t])
        outputs.append(y_t)
    forms = [torch.stack(outputs, dim=1), *(onchip.ssd(x, dt, A, B, C, chunk_size=size) for size in (1, 16, 48, 256))]
    return max((form - matrix).abs().max().item() for form in forms)


def duality(error: float) -> Finding:
    """Whether the forms differ by no more than rounding does."""
    return Finding(
        "the matrix, the recurrence and the chunks of it compute the same",
        f"at most {error:.0e} apart, in float64, chunks of 1, 16, 48 and 256",
        error < EXACT,
    )


def measure(length: int, states: Sequence[int], seconds: float) -> dict[str, dict[int, "Quartiles"]]:
    """Both operations in turns, at each size of the state."""
    import torch

    from onchip.bench.timing import Candidate, interleave, ratio

    found: dict[str, dict[int, Quartiles]] = {of: {} for of in PASSES}
    share = seconds / len(states) / len(PASSES)
    for n in states:
        for of, grad in zip(PASSES, (False, True), strict=True):
            calls = {"ssd": Candidate(ssd(length, n, grad)), "scan": Candidate(scan(length, n, grad))}
            times = interleave(calls, torch.device("cpu"), seconds=share, min_rounds=3)
            found[of][n] = ratio(times["scan"], times["ssd"])
    return found


def ssd(length: int, n: int, grad: bool) -> Callable[[], object]:
    """A call with one step of time and one rate a head."""
    import torch

    import onchip

    heads = CHANNELS // HEAD_DIM
    x, dt, A = torch.randn(1, length, heads, HEAD_DIM), 0.1 * torch.rand(1, length, heads), -torch.rand(heads) - 0.5
    return passes(onchip.ssd, (x, dt, A, *torch.randn(2, 1, length, 1, n)), grad)


def scan(length: int, n: int, grad: bool) -> Callable[[], object]:
    """A call with as many channels and numbers of memory, whose steps and rates are each their own."""
    import torch

    import onchip

    x, dt, A = torch.randn(1, length, CHANNELS), 0.1 * torch.rand(1, length, CHANNELS), -torch.rand(CHANNELS, n) - 0.5
    return passes(onchip.selective_scan, (x, dt, A, *torch.randn(2, 1, length, 1, n)), grad)


def passes(operation: Callable[..., object], inputs: Sequence[object], grad: bool) -> Callable[[], object]:
    """A call of the forward pass, or of both."""
    import torch

    leaves = [x.detach().requires_grad_(grad) for x in inputs if isinstance(x, torch.Tensor)]

    def call() -> object:
        y = operation(*leaves)
        assert isinstance(y, torch.Tensor)
        return torch.autograd.grad(y.sum(), leaves) if grad else y

    return call


def speed(speedups: Speedups) -> Finding:
    """Whether ssd is so much faster as published, in both passes, wherever the state is large."""
    held = {f"{of}, state {n}": r.median for of, ratios in speedups.items() for n, r in ratios.items() if n >= LARGE}
    worst, best = min(held, key=lambda name: held[name]), max(held, key=lambda name: held[name])
    return Finding(
        f"ssd is 2 to 8 times faster than the selective scan (here from states of {LARGE} on)",
        f"{held[worst]:.1f} times ({worst}) to {held[best]:.1f} times ({best})",
        held[worst] >= PUBLISHED_SPEEDUP,
    )


def learn(steps: int, lr: float) -> list["Point"]:
    """How much Mamba-2 recalls while it learns to."""
    import synthetic
    import torch

    def task(batch: int) -> synthetic.Batch:
        length = int(torch.randint(4 * PAIRS, LENGTH + 1, ()))
        return synthetic.associative_recall(batch, length, PAIRS, VOCAB_SIZE)

    mixer = {"mixer": "mamba2", "d_state": 32, "head_dim": 32}
    model = synthetic.language_model(mixer, vocab_size=VOCAB_SIZE, d_model=64)
    test = synthetic.associative_recall(256, LENGTH, PAIRS, VOCAB_SIZE)
    return synthetic.train(model, task, test, steps=steps, lr=lr)


def recall(learned: Mapping[float, Sequence["Point"]]) -> Finding:
    """Whether one of the learning rates has led there."""
    ends = {rate: points[-1].accuracy for rate, points in learned.items()}
    best, worst = max(ends, key=lambda rate: ends[rate]), min(ends, key=lambda rate: ends[rate])
    return Finding(
        "multi-query associative recall is solved",
        f"{ends[best]:.1%} of {PAIRS} pairs at a learning rate of {best:g}, {ends[worst]:.1%} at {worst:g}",
        ends[best] >= RECALLED,
    )


def draw(speedups: Speedups, learned: Mapping[float, Sequence["Point"]], out: Path) -> Path:
    """Speed over the size of the state, and what is recalled over the steps of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhspan(2, 8, color="#8a8a8a", alpha=0.15, linewidth=0)
    for of, ratios in speedups.items():
        states = list(ratios)
        low, median, high = zip(*ratios.values(), strict=True)
        left.fill_between(states, low, high, color=COLORS[of], alpha=0.2, linewidth=0)
        left.plot(states, median, "o-", color=COLORS[of], label=of)
    left.annotate("published, A100", (states[0], 8), xytext=(0, -11), textcoords="offset points", fontsize=8)
    left.axhline(1, color="#8a8a8a", linewidth=0.8, linestyle=":")
    left.set_xscale("log", base=2)
    left.set_xticks(states, [str(n) for n in states])
    left.minorticks_off()
    left.set_ylim(bottom=0)
    left.set_xlabel("state a channel")
    left.set_ylabel("speed of ssd, selective scan = 1")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    for (rate, points), color in zip(learned.items(), ("#9db8dc", "#3b6fb6", "#1c3d68", "#d1582f"), strict=False):
        steps, values = [point.step for point in points], [100 * point.accuracy for point in points]
        right.plot(steps, values, "-" if len(points) > 1 else "o", color=color, label=f"{rate:g}")
    right.set_ylim(0, 108)
    right.set_xlabel("step of training")
    right.set_ylabel("associative recall, % right")
    right.legend(title="learning rate", loc="center right", frameon=False, fontsize=8, title_fontsize=8)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Mamba-2's claims, measured on this CPU", fontsize=11)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "mamba2.png"
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    typer.run(main)
