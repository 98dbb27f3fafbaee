"""HiPPO-LegS (Gu et al. 2020, arXiv 2008.07669): a memory of all of the past in N numbers, without a timescale.

The paper claims of LegS, in theory (§3):
  1. The coefficients are those of the best polynomial of degree N - 1 of all that was heard: the signal comes back, and
     the better the larger N (proposition 6).
  2. An update takes O(N) operations: it is that of the dense matrix, which takes O(N²) (proposition 4).
  3. It has no timescale: a signal played slower leaves the same coefficients (proposition 3).
  4. Gradients do not vanish exponentially: what an input leaves falls as 1/t (proposition 5).

Here each is measured, in float64, and passes or fails by itself. The signal is noise of limited band, 10,000 samples
(a million in the paper). LegT, which is Voelker's LMU, has a window of a tenth of the signal, to show what a timescale
does to what lies before it. The number of samples is half that at double speed, so that equality is up to the error of
sampling: it must fall to a half, or below, with every doubling of both.

    python reproductions/hippo.py             half a minute
    python reproductions/hippo.py --quick     a shorter signal
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

ORDERS = (16, 32, 64, 128)
ERROR = 0.02  # of the largest order, relative to the signal
CYCLES = 20  # the highest frequency of the signal, over its length
DENSE = 1e-12
BLUE, RED, GREY = "#3b6fb6", "#d1582f", "#8a8a8a"


@dataclass(frozen=True)
class Finding:
    """A claim and what became of it."""

    claim: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class Memories:
    """The signal and what memories of it give back, all `(points,)`, over the lag as a fraction of the history."""

    lag: "Tensor"
    signal: "Tensor"
    legs: "dict[int, Tensor]"
    legt: "Tensor"

    def error(self, N: int) -> float:
        """What LegS of order N misses, relative to the signal, in root mean squares."""
        return ((self.legs[N] - self.signal).square().mean() / self.signal.square().mean()).sqrt().item()


def main(
    out: Annotated[Path, typer.Option(help="Folder for the plot.")] = Path("runs/reproductions"),
    quick: Annotated[bool, typer.Option("--quick", help="A shorter signal.")] = False,
) -> None:
    """Measure the claims of HiPPO-LegS. Exit code 0 if all hold, else 1."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from onchip.bench import machine

    torch.set_num_threads(machine.cores())
    length = 1000 if quick else 10_000
    memories = remember(length)
    scales, left = timescales((125, 250, 500) if quick else (500, 1000, 2000, 4000)), influence(length)
    findings = [reconstruction(memories), linear_time(length // 10), equivariance(scales), gradients(left)]
    console = Console()
    verdicts = Table("claim", "measured here", "")
    for finding in findings:
        verdicts.add_row(finding.claim, finding.measured, "[green]PASS" if finding.holds else "[red]FAIL")
    console.print(verdicts)
    print(draw(memories, scales, left, out))
    raise typer.Exit(0 if all(finding.holds for finding in findings) else 1)


def noise(at: "Tensor") -> "Tensor":
    """A signal on [0, 1]: as many waves as `CYCLES`, of random phase and weight, and the same at every call."""
    import torch

    generator = torch.Generator().manual_seed(0)
    weight, phase = (torch.randn(CYCLES, dtype=torch.float64, generator=generator) for _ in range(2))
    k = torch.arange(1, CYCLES + 1, dtype=torch.float64)
    f: Tensor = (weight * torch.cos(2 * math.pi * (k * at[:, None] + phase))).sum(-1) / CYCLES**0.5
    return f


def samples(length: int) -> "Tensor":
    """The middles of `length` equal pieces of [0, 1]."""
    import torch

    return (torch.arange(length, dtype=torch.float64) + 0.5) / length


def legs(f: "Tensor", N: int) -> "Tensor":
    """The coefficients after all of the signal."""
    import torch

    from onchip.nn import hippo

    c = torch.zeros(N, dtype=f.dtype)
    for t, f_t in enumerate(f, start=1):
        c = hippo.legs_update(c, f_t, t)
    return c


def remember(length: int) -> Memories:
    """Let every memory hear the signal, and ask them for it. LegS is triangular: fewer coefficients are the first."""
    import torch

    from onchip.nn import hippo

    f, lag = noise(samples(length)), samples(400)
    coefficients = legs(f, ORDERS[-1])
    heard = {N: hippo.reconstruct(coefficients[:N], lag) for N in ORDERS}
    window, N = 0.1, ORDERS[-1] // 2
    A, B = hippo.discretize(*hippo.transition("legt", N), 1 / (window * length))
    c = torch.zeros(N, dtype=f.dtype)
    for f_t in f:
        c = A @ c + B * f_t
    legt = hippo.reconstruct(c, (lag / window).clamp(max=1), "legt")
    return Memories(lag, noise(1 - lag), heard, torch.where(lag <= window, legt, torch.nan))


def reconstruction(memories: Memories) -> Finding:
    """Whether the signal comes back, the better the larger N."""
    errors = [memories.error(N) for N in ORDERS]
    return Finding(
        "the signal comes back, the better the larger N",
        ", ".join(f"N {N}: {error:.1%}" for N, error in zip(ORDERS, errors, strict=True)) + " missed",
        errors == sorted(errors, reverse=True) and errors[-1] < ERROR,
    )


def linear_time(T: int) -> Finding:
    """The O(N) update next to the dense one, after T random inputs."""
    import torch

    from onchip.nn import hippo

    N = 64
    f = torch.randn(T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    A, B = hippo.transition("legs", N)
    worst = 0.0
    for method in ("bilinear", "backward"):
        steps = hippo.discretize(A, B, 1 / torch.arange(1, T + 1, dtype=torch.float64), method)
        dense = fast = hippo.legs_update(torch.zeros_like(B), f[0], 1)
        for t in range(2, T + 1):
            dense = steps.A[t - 1] @ dense + steps.B[t - 1] * f[t - 1]
            fast = hippo.legs_update(fast, f[t - 1], t, method)
        worst = max(worst, (fast - dense).abs().max().item())
    return Finding(
        "the update in O(N) is that of the dense matrix",
        f"N {N}, {T} inputs, bilinear and backward Euler: at most {worst:.0e} off",
        worst < DENSE,
    )


def timescales(lengths: Sequence[int]) -> dict[int, float]:
    """How far a signal's coefficients are from those of the same at half the speed, for doubling numbers of samples."""
    heard = {length: legs(noise(samples(length)), 32) for length in (*lengths, 2 * lengths[-1])}
    return {n: ((heard[n] - heard[2 * n]).norm() / heard[2 * n].norm()).item() for n in lengths}


def equivariance(scales: dict[int, float]) -> Finding:
    """Whether the difference is that of sampling, and vanishes with it."""
    values = list(scales.values())
    falling = all(later <= 0.55 * earlier for earlier, later in pairwise(values))
    return Finding(
        "a signal at half the speed leaves the same coefficients",
        ", ".join(f"{length}: {value:.1e}" for length, value in scales.items()) + " apart",
        falling and values[-1] < 0.05,
    )


def influence(length: int) -> "Tensor":
    """The norm of the derivative of c[t] in f[t₀] for one t₀ and every t after it, `(length,)`; 0 before.

    It is √(Σ (2n + 1)·P_n(2t₀/t - 1)²) / t, whose root is N once t₀/t is far below 1/N².
    """
    import torch

    from onchip.nn import hippo

    N, start = 8, length // 1000
    c, norms = torch.zeros(N, dtype=torch.float64), [0.0] * start
    for t in range(start + 1, length + 1):  # a linear system: its derivative is what one impulse leaves
        c = hippo.legs_update(c, torch.tensor(float(t == start + 1), dtype=c.dtype), t)
        norms.append(c.norm().item())
    return torch.tensor(norms)


def gradients(left: "Tensor") -> Finding:
    """The exponent of t in what an input leaves, over the second half of the history."""
    half, end = len(left) // 2, len(left)
    exponent = math.log(left[end - 1] / left[half - 1]) / math.log(end / half)
    return Finding(
        "what an input leaves falls as 1/t, not exponentially",
        f"as t to the {exponent:.2f} from {half} to {end} inputs",
        -1.2 < exponent < -0.8,
    )


def draw(memories: Memories, scales: dict[int, float], left: "Tensor", out: Path) -> Path:
    """The signal and its memories; errors over N and over the sampling; what an input leaves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.6), layout="constrained")
    top, *below = figure.subplot_mosaic([["signal"] * 3, ["orders", "scales", "gradients"]]).values()
    past, N = -memories.lag.numpy(), ORDERS[-1]
    top.plot(past, memories.signal, color=GREY, linewidth=3, alpha=0.5)
    top.plot(past, memories.legs[ORDERS[1]], color="#e0a030", linewidth=1)
    top.plot(past, memories.legs[N], color=BLUE, linewidth=1)
    top.plot(past, memories.legt, color=RED, linewidth=1)
    labels = (("signal", GREY), (f"LegS, N {ORDERS[1]}", "#e0a030"), (f"LegS, N {N}", BLUE), ("LegT, its window", RED))
    for i, (label, color) in enumerate(labels):
        top.annotate(label, (0.01 + 0.14 * i, 1.02), xycoords="axes fraction", color=color)
    top.set_xlabel("time before now, as a fraction of the history")
    below[0].plot(ORDERS, [memories.error(N) for N in ORDERS], "o-", color=BLUE)
    below[0].set_xlabel("coefficients N")
    below[0].set_ylabel("missed, of the signal")
    below[1].plot(list(scales), list(scales.values()), "o-", color=BLUE)
    below[1].set_xlabel("samples, and twice as many")
    below[1].set_ylabel("coefficients apart")
    first = int((left > 0).nonzero()[0])
    t = range(first + 1, len(left) + 1)
    below[2].plot(t, left[first:], color=BLUE)
    below[2].plot(t, [left[-1].item() * len(left) / i for i in t], ":", color=GREY)
    below[2].annotate("1/t", (first + 1, left[-1].item() * len(left) / (first + 1)), color=GREY,
                      xytext=(4, 2), textcoords="offset points")  # fmt: skip
    below[2].set_xlabel("inputs t")
    below[2].set_ylabel("gradient in an early input")
    for panel in below:
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.minorticks_off()
    below[0].set_xticks(ORDERS, [str(N) for N in ORDERS])
    below[1].set_xticks(list(scales), [str(length) for length in scales])
    for panel in (top, *below):
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle("HiPPO-LegS: what it remembers, without a timescale", fontsize=11)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "hippo.png"
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    typer.run(main)
