"""LSSL (Gu et al. 2021, arXiv 2110.13985): one linear layer that is recurrent, convolutional and continuous in time.

The paper claims:
  1. The recurrence of a layer is a convolution, and so is trained in parallel (§3.1).
  2. Its kernel is a Krylov function, which doubling makes without a loop over the length (appendix C.2).
  3. It is a system in continuous time: a signal sampled twice as densely is heard the same with half the step (§3.1).
  4. It classifies images read pixel by pixel (sequential MNIST: 99.5 %).
  5. For that its state matrix must be HiPPO's: with a random one, 60 % of sequential MNIST (arXiv 2111.00396, §1).

Here each is measured on this machine, and passes or fails by itself. The images are scikit-learn's 1,797 digits
instead: the claim is taken to hold if LSSL, its state matrix that of HiPPO and not learned, reaches 90 % where the same
model without memory does not reach 60 %; and a random matrix, normal with variance 1/N less the identity, to do
worse if it is wrong at least twice as often.

    python reproductions/lssl.py             about four minutes
    python reproductions/lssl.py --quick     short sequences, one epoch: it runs, and says little
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onchip.bench import machine

if TYPE_CHECKING:
    from torch import Tensor

ACCURACY, WITHOUT_MEMORY = 0.90, 0.60
EXACT = 1e-10
BLUE, RED, GREY = "#3b6fb6", "#d1582f", "#8a8a8a"


@dataclass(frozen=True)
class Finding:
    """A claim and what became of it."""

    claim: str
    measured: str
    holds: bool


def main(
    out: Annotated[Path, typer.Option(help="Folder for the plot.")] = Path("runs/reproductions"),
    quick: Annotated[bool, typer.Option("--quick", help="Short sequences, one epoch.")] = False,
) -> None:
    """Measure the claims of LSSL on this machine. Exit code 0 if all hold, else 1."""
    import torch
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(machine.cores())
    heard = {samples: response(samples) for samples in ((64, 128, 256) if quick else (64, 128, 256, 512, 1024))}
    learned = learn(1, d_model=8) if quick else learn(15, d_model=64)
    length = 64 if quick else 1024
    findings = [views(length), krylov(length), continuity(heard), classification(learned), structure(learned)]
    console = Console()
    verdicts = Table("claim", "measured here", "")
    for finding in findings:
        verdicts.add_row(finding.claim, finding.measured, "[green]PASS" if finding.holds else "[red]FAIL")
    console.print(verdicts)
    print(draw(heard, learned, out))
    raise typer.Exit(0 if all(finding.holds for finding in findings) else 1)


def views(length: int) -> Finding:
    """The recurrence, the convolution and, as the definition, the Toeplitz matrix of a layer, in float64."""
    import torch

    from onchip.nn.mixers import LSSL

    torch.manual_seed(0)
    mixer, x = LSSL(4, 64).double(), torch.randn(1, length, 4, dtype=torch.float64)
    with torch.no_grad():
        convolution, steps, state = mixer(x), [], mixer.initial_state(1)
        matrix = mixer.apply_matrix(x, mixer.matrix(x))
        for x_t in x.unbind(1):
            y_t, state = mixer.step(x_t, state)
            steps.append(y_t)
    error = max((other - convolution).abs().max().item() for other in (torch.stack(steps, dim=1), matrix))
    return Finding(
        "the recurrence is a convolution",
        f"and a Toeplitz matrix: {length} tokens, N 64, at most {error:.0e} off, in float64",
        error < EXACT,
    )


def krylov(length: int) -> Finding:
    """The kernel by doubling, next to one power after the other."""
    import torch

    from onchip.nn import hippo
    from onchip.nn.state_space import LinearSystem

    torch.manual_seed(0)
    N, dt = 64, torch.tensor([0.001, 0.01, 0.1], dtype=torch.float64)
    A, B = hippo.discretize(*hippo.transition("legs", N), dt)
    C, x, naive = torch.randn(3, N, dtype=torch.float64), B, []
    for _ in range(length):
        naive.append((C * x).sum(-1))
        x = (A @ x[..., None])[..., 0]
    expected = torch.stack(naive, dim=-1)
    error = (LinearSystem(A, B, C).kernel(length) - expected).abs().max().item() / expected.abs().max().item()
    return Finding(
        "doubling makes the kernel",
        f"N {N}, L {length}: at most {error:.0e} of its largest entry off one power after the other",
        error < EXACT,
    )


def response(samples: int) -> "Tensor":
    """What a system hears of a signal on [0, 1] in that many samples, at the ends of 64 equal pieces."""
    import torch

    from onchip.nn import hippo
    from onchip.nn.state_space import LinearSystem, causal_convolution

    t = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
    u = (torch.sin(2 * math.pi * 3 * t) + 0.5 * torch.cos(2 * math.pi * 7 * t))[None]
    A, B = hippo.discretize(*hippo.transition("legs", 16), torch.tensor([4 / samples], dtype=torch.float64))
    C = torch.randn(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = causal_convolution(u, LinearSystem(A, B, C).kernel(samples))
    return y[0, samples // 64 - 1 :: samples // 64]


def apart(heard: "Mapping[int, Tensor]") -> dict[int, float]:
    """How far each sampling's outputs are from those of the next finer one, relative to them."""
    return {a: ((heard[a] - heard[b]).norm() / heard[b].norm()).item() for a, b in pairwise(heard)}


def continuity(heard: "Mapping[int, Tensor]") -> Finding:
    """Whether outputs at the same times converge: the bilinear rule is of second order."""
    errors = apart(heard)
    values = list(errors.values())
    return Finding(
        "sampled twice as densely, with half the step, it hears the same",
        ", ".join(f"{samples}: {error:.1e}" for samples, error in errors.items()) + " apart",
        all(finer < coarser / 3 for coarser, finer in pairwise(values)) and values[-1] < 0.01,
    )


def learn(epochs: int, d_model: int) -> dict[str, list[float]]:
    """Test accuracy on sequential digits after each epoch."""
    import digits
    import torch

    from onchip.nn.mixers import LSSL

    def lssl(d_model: int) -> LSSL:
        return LSSL(d_model, 32, dt_min=0.01, dt_max=0.5)

    def at_random(d_model: int) -> LSSL:
        mixer = lssl(d_model)
        mixer.A.copy_(torch.randn_like(mixer.A) / 32**0.5 - torch.eye(32))
        return mixer

    makers = {"LSSL": lssl, "random A": at_random, "without memory": digits.Memoryless}
    return {name: digits.accuracies(make, epochs, d_model) for name, make in makers.items()}


def classification(learned: Mapping[str, Sequence[float]]) -> Finding:
    """Whether LSSL classifies what cannot be classified without memory."""
    lssl, none = learned["LSSL"][-1], learned["without memory"][-1]
    return Finding(
        "images are classified pixel by pixel",
        f"{lssl:.1%} of 360 digits, without memory {none:.1%}",
        lssl >= ACCURACY and none < WITHOUT_MEMORY,
    )


def structure(learned: Mapping[str, Sequence[float]]) -> Finding:
    """Whether it takes HiPPO's matrix."""
    hippo, at_random = learned["LSSL"][-1], learned["random A"][-1]
    return Finding(
        "with a random state matrix it does far worse",
        f"{at_random:.1%} of the digits, with HiPPO's {hippo:.1%}",
        1 - at_random >= 2 * (1 - hippo),
    )


def draw(heard: "Mapping[int, Tensor]", learned: Mapping[str, Sequence[float]], out: Path) -> Path:
    """What is heard at two samplings, how far samplings are apart, and accuracy over the epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    coarse, *_, fine = heard
    time = [(i + 1) / 64 for i in range(64)]
    left.plot(time, heard[fine], color=GREY, linewidth=3, alpha=0.5)
    left.plot(time, heard[coarse], ".", color=BLUE)
    for place, label, color in ((0.0, f"{fine} samples", GREY), (0.4, f"{coarse} samples", BLUE)):
        left.annotate(label, (place, 1.02), xycoords="axes fraction", color=color)
    left.set_xlabel("time")
    left.set_ylabel("output")
    errors = apart(heard)
    middle.loglog(list(errors), list(errors.values()), "o-", color=BLUE)
    middle.minorticks_off()
    middle.set_xticks(list(errors), [str(samples) for samples in errors])
    middle.set_xlabel("samples, and twice as many")
    middle.set_ylabel("outputs apart")
    for label, color in (("LSSL", BLUE), ("random A", "#e0a030"), ("without memory", RED)):
        values = [100 * x for x in learned[label]]
        right.plot(range(1, len(values) + 1), values, "o-" if len(values) == 1 else "-", color=color)
        right.annotate(
            label, (len(values), values[-1]), color=color, xytext=(0, -12), textcoords="offset points", ha="right"
        )
    right.axhline(100 * ACCURACY, color=GREY, linewidth=0.8, linestyle=":")
    right.set_ylim(0, 102)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_xlabel("epoch")
    right.set_ylabel("sequential digits, % right")
    for panel in (left, middle, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle("LSSL's claims: continuous in time, and digits pixel by pixel", fontsize=11)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "lssl.png"
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    typer.run(main)
