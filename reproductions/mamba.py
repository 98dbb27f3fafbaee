"""Mamba (Gu and Dao 2023, arXiv 2312.00752): a state space whose input sets its pace, in linear time.

The paper claims:
  1. Tokens strewn over noise are copied in order by a selective state space (99.8 % of them) and not by a
     time-invariant one: S4 in the same block reaches 56.4 %, in its own 18.3 % (table 1).
  2. What followed a token before is still known far beyond the length of training: learnt at 256 tokens, Mamba is right
     at a million, attention only up to twice the length it was trained at (table 2).
  3. Its time is linear in the length where attention's is quadratic, so that it is faster from some length on (2,048 on
     an A100; figure 8).

Here each is measured on this machine, and passes or fails by itself. All is much smaller than published, so that a CPU
trains it in minutes: 8 tokens strewn over 64 instead of 16 over 4,096, and some hundred steps of training instead of
hundreds of thousands. Both tasks are learnt at many lengths, since long sequences alone teach a model nothing for a
long time: copying over 8 to 64 tokens and judged at 64, induction heads over powers of two from 8 to 256 and judged
there and at 8 times the longest. The models have two layers of width 64 as published, with an MLP after each mixer;
S4D's has as many numbers of memory as Mamba's, and by wider MLPs as many parameters. Times are those of the operations
of layers of equal width 256, forward, in float32.

    python reproductions/mamba.py             about 7 minutes on two cores
    python reproductions/mamba.py --quick     a few steps of training, short sequences: it runs, and says little
"""

import math
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

COPIED, NOT_COPIED = 0.95, 0.60  # the part of the tokens from which on, and up to which, a model counts as such
REMEMBERED, FORGOTTEN = 0.95, 0.50
LINEAR, QUADRATIC = 1.15, 1.7  # the largest exponent of T that counts as the one, the smallest as the other
VOCAB_SIZE = 16
BLANKS, COPIES = 64, 8  # of selective copying
D_MLP = {"Mamba": 64, "S4D": 192}  # for 91,200 and 91,712 parameters
LENGTH = 256  # the longest that induction heads are learnt at
MULTIPLES = (1, 2, 4, 8, 16)
FAR = 8  # the multiple of the length at which extrapolation is judged
COLORS = {"Mamba": "#3b6fb6", "S4D": "#d1582f", "attention": "#d1582f"}
MIXERS: dict[str, dict[str, object]] = {
    "Mamba": {"mixer": "mamba"},
    "S4D": {"mixer": "s4d", "d_state": 32},
    "attention": {"mixer": "attention", "n_heads": 4},
}


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
    """Measure the claims of Mamba on this machine. Exit code 0 if all hold, else 1."""
    if dict(os.environ) != machine.environment("tuned"):
        os.execve(sys.executable, [sys.executable, *sys.argv], machine.environment("tuned"))
    import torch
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(machine.cores())
    lengths = [128, 256, 512] if quick else [512, 1024, 2048, 4096, 8192]
    times = measure_times(lengths, seconds=0.5 if quick else 30.0)
    learned = learn_copying(4 if quick else 1500)
    right = learn_induction(4, (1, 2), 2**12) if quick else learn_induction(1500, MULTIPLES, 2**18)
    findings = [copying(learned), induction(right), growth(lengths, times)]

    console = Console()
    far, long = Table("tokens", *right, title="induction heads"), Table("T", *times, title="time, forward")
    for multiple in right["Mamba"]:
        far.add_row(str(LENGTH * multiple), *(f"{parts[multiple]:.1%}" for parts in right.values()))
    for i, length in enumerate(lengths):
        long.add_row(str(length), *(f"{1e3 * values[i]:.2f} ms" for values in times.values()))
    verdicts = Table("claim", "measured here", "")
    for finding in findings:
        verdicts.add_row(finding.claim, finding.measured, "[green]PASS" if finding.holds else "[red]FAIL")
    console.print(far, long, verdicts)
    print(draw(learned, right, lengths, times, out))
    raise typer.Exit(0 if all(finding.holds for finding in findings) else 1)


def learn_copying(steps: int) -> dict[str, list["Point"]]:
    """How much of selective copying Mamba and S4D get right while they learn it."""
    import synthetic
    import torch

    def task(batch: int) -> synthetic.Batch:
        blanks = int(torch.randint(COPIES, BLANKS + 1, ()))
        return synthetic.selective_copying(batch, blanks, COPIES, VOCAB_SIZE)

    torch.manual_seed(2)
    test = synthetic.selective_copying(256, BLANKS, COPIES, VOCAB_SIZE)
    learned = {}
    for name in D_MLP:
        model = synthetic.language_model(MIXERS[name], vocab_size=VOCAB_SIZE, d_model=64, d_mlp=D_MLP[name])
        learned[name] = synthetic.train(model, task, test, steps=steps, lr=1e-2)
    return learned


def copying(learned: Mapping[str, Sequence["Point"]]) -> Finding:
    """Whether the selective model copies and the time-invariant one does not, at the end of training."""
    mamba, s4d = (learned[name][-1].accuracy for name in ("Mamba", "S4D"))
    return Finding(
        "a selective state space copies selectively, a time-invariant one does not",
        f"of {COPIES} tokens strewn over {BLANKS} Mamba copies {mamba:.1%}, S4D {s4d:.1%}",
        mamba >= COPIED and s4d <= NOT_COPIED,
    )


def learn_induction(steps: int, multiples: Sequence[int], tokens: int) -> dict[str, dict[int, float]]:
    """Trained on induction heads of up to `LENGTH` tokens, what part is right at multiples of it, of so many tokens."""
    import synthetic

    def task(batch: int) -> synthetic.Batch:
        return synthetic.induction_heads(batch, synthetic.power_of_two(8, LENGTH), VOCAB_SIZE)

    tests = {m: synthetic.induction_heads(tokens // (LENGTH * m), LENGTH * m, VOCAB_SIZE) for m in multiples}
    right = {}
    for name in ("Mamba", "attention"):
        model = synthetic.language_model(MIXERS[name], vocab_size=VOCAB_SIZE, d_model=64)
        synthetic.train(model, task, task(1), steps=steps, lr=5e-3, weight_decay=0.0)  # only its end is looked at
        right[name] = {multiple: synthetic.accuracy(model, test) for multiple, test in tests.items()}
    return right


def induction(right: Mapping[str, Mapping[int, float]]) -> Finding:
    """Whether both learn, and Mamba alone is right at `FAR` times the length, or the most that was measured."""
    mamba, attention = right["Mamba"], right["attention"]
    far = max(multiple for multiple in mamba if multiple <= FAR)
    return Finding(
        "what followed a token before is known far beyond the length of training, by Mamba and not by attention",
        f"at {LENGTH} tokens Mamba {mamba[1]:.0%} and attention {attention[1]:.0%}, at {far} times as many "
        f"{mamba[far]:.0%} and {attention[far]:.0%}",
        min(mamba[1], mamba[far], attention[1]) >= REMEMBERED and attention[far] <= FORGOTTEN,
    )


def measure_times(lengths: Sequence[int], seconds: float) -> dict[str, list[float]]:
    """Seconds that a Mamba layer's scan and a layer's attention of width 256 take at each length, all in turns."""
    import torch

    from onchip.bench.timing import Candidate, interleave, quartiles

    makers = {"Mamba": scan, "attention": attention}
    calls = {f"{name} {length}": Candidate(make(length)) for name, make in makers.items() for length in lengths}
    times = interleave(calls, torch.device("cpu"), seconds=seconds, min_rounds=5)
    return {name: [quartiles(times[f"{name} {length}"]).median for length in lengths] for name in makers}


def scan(length: int, width: int = 256, d_state: int = 16) -> Callable[[], object]:
    """A call of the selective scan as a layer of this width has it, with a gate and twice as many channels."""
    import torch

    import onchip

    x, dt, z = torch.randn(3, 1, length, 2 * width)
    B, C = torch.randn(2, 1, length, 1, d_state)
    A, dt = -torch.rand(2 * width, d_state) - 0.5, 0.1 * torch.nn.functional.softplus(dt)
    return lambda: onchip.selective_scan(x, dt, A, B, C, z=z)


def attention(length: int, width: int = 256, head_dim: int = 64) -> Callable[[], object]:
    """A call of causal attention as a layer of this width has it."""
    import torch

    import onchip

    q, k, v = torch.randn(3, 1, length, width // head_dim, head_dim)
    return lambda: onchip.attention(q, k, v, causal=True)


def growth(lengths: Sequence[int], times: Mapping[str, Sequence[float]]) -> Finding:
    """Whether the exponents of T are those of linear and of quadratic time, and the scan is faster in the end."""
    mamba, attention = (exponent(lengths, times[name]) for name in ("Mamba", "attention"))
    ratio = [b / a for a, b in zip(times["Mamba"], times["attention"], strict=True)]
    faster = next((f"from T {length} on" for length, r in zip(lengths, ratio, strict=True) if r > 1), "at no length")
    return Finding(
        "time is linear in the length where attention's is quadratic",
        f"T to the {mamba:.2f}, attention T to the {attention:.2f}; the scan is faster {faster}, "
        f"{ratio[-1]:.1f} times at {lengths[-1]}",
        mamba <= LINEAR and attention >= QUADRATIC and ratio[-1] > 1,
    )


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """The slope of a line through the logarithms, by least squares."""
    x, y = [math.log(length) for length in lengths], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    rise = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return rise / sum((a - mean_x) ** 2 for a in x)


def draw(
    learned: Mapping[str, Sequence["Point"]],
    right: Mapping[str, Mapping[int, float]],
    lengths: Sequence[int],
    times: Mapping[str, Sequence[float]],
    out: Path,
) -> Path:
    """A panel for each claim."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    copied, far, long = figure.subplots(1, 3)
    for name, points in learned.items():
        values = [100 * point.accuracy for point in points]
        style = "-" if len(points) > 1 else "o"
        copied.plot([point.step for point in points], values, style, color=COLORS[name], label=name)
    copied.set_xlabel("step of training")
    copied.set_ylabel("selective copying, % right")
    for name, parts in right.items():
        tokens = [LENGTH * multiple for multiple in parts]
        far.plot(tokens, [100 * part for part in parts.values()], "o-", color=COLORS[name], label=name)
    far.axvspan(8, LENGTH, color="#8a8a8a", alpha=0.15, linewidth=0)
    far.annotate("trained", (LENGTH, 2), xytext=(-3, 0), textcoords="offset points", fontsize=8, ha="right")
    far.set_xlabel("tokens")
    far.set_ylabel("induction heads, % right")
    for panel in (copied, far):
        panel.set_ylim(0, 108)
    for name, seconds in times.items():
        label = f"{name}: T to the {exponent(lengths, seconds):.2f}"
        long.plot(lengths, [1e3 * value for value in seconds], "o-", color=COLORS[name], label=label)
    long.set_yscale("log")
    long.set_xlabel("sequence length T")
    long.set_ylabel("milliseconds, forward, width 256")
    for panel in (far, long):
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
    for panel in (copied, far, long):
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    figure.suptitle("Mamba's claims, measured on this CPU: two layers of width 64 that learn, and times", fontsize=11)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "mamba.png"
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    typer.run(main)
