"""S4 (Gu et al. 2021, arXiv 2111.00396): a state space layer that is a convolution, a recurrence, and fast as both.

The paper claims:
  1. A layer has three views that compute the same: in parallel, in chunks and step by step (§2).
  2. The kernel of length L comes from a Cauchy matrix in O(N + L) space, without powers of the N×N matrix (theorem 3).
  3. Generation is 60 times faster than a Transformer's, since a step costs the same however long the context (§4.3).
  4. It classifies images read pixel by pixel (sequential CIFAR-10: 91 %).

Here each is measured on this machine, and passes or fails by itself. The Transformer has as many layers, features and
sequences, keeps its keys and values, and differs from the S4 model in its mixers alone; its cache is filled with random
numbers, and both take steps after it, on one core. How long the context must be for a factor of 60 is a matter of the
machine; here it is sought up to 131,072 tokens. The images are scikit-learn's 1,797 digits instead: the claim is taken
to hold if S4 reaches 95 % where the same model without memory does not reach 60 %.

    python reproductions/s4.py             about five minutes
    python reproductions/s4.py --quick     short contexts, one epoch: it runs, and says little
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onchip.bench import machine

if TYPE_CHECKING:
    from onchip.bench.timing import Quartiles
    from onchip.models import LanguageModel, ModelState

PUBLISHED_SPEEDUP = 60
ACCURACY, WITHOUT_MEMORY = 0.95, 0.60
EXACT = 1e-10
BATCH, D_MODEL, DEPTH = 4, 256, 1
BLUE, RED = "#3b6fb6", "#d1582f"


@dataclass(frozen=True)
class Finding:
    """A claim and what became of it."""

    claim: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class Steps:
    """Seconds a step takes at each context, and how much longer attention's are, round by round."""

    contexts: Sequence[int]
    s4: Sequence[float]
    attention: Sequence[float]
    speedup: "Sequence[Quartiles]"


def main(
    out: Annotated[Path, typer.Option(help="Folder for the plot.")] = Path("runs/reproductions"),
    quick: Annotated[bool, typer.Option("--quick", help="Short contexts, one epoch.")] = False,
) -> None:
    """Measure the claims of S4 on this machine. Exit code 0 if all hold, else 1."""
    if dict(os.environ) != machine.environment("tuned"):
        os.execve(sys.executable, [sys.executable, *sys.argv], machine.environment("tuned"))
    import torch
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(1)
    steps = measure_steps((64, 128) if quick else (1024, 8192, 32768, 131072), seconds=0.2 if quick else 8.0)
    torch.set_num_threads(machine.cores())
    learned = learn(1, d_model=8) if quick else learn(20, d_model=64)
    findings = [
        views(64 if quick else 1024),
        kernels(256 if quick else 4096),
        generation(steps),
        classification(learned),
    ]

    console = Console()
    figures = Table("context", "S4", "attention", "attention over S4")
    for context, s4, attention, ratio in zip(steps.contexts, steps.s4, steps.attention, steps.speedup, strict=True):
        figures.add_row(str(context), f"{1e3 * s4:.2f} ms", f"{1e3 * attention:.2f} ms", f"{ratio.median:.1f}")
    verdicts = Table("claim", "measured here", "")
    for finding in findings:
        verdicts.add_row(finding.claim, finding.measured, "[green]PASS" if finding.holds else "[red]FAIL")
    console.print(figures, verdicts)
    print(draw(steps, learned, out))
    raise typer.Exit(0 if all(finding.holds for finding in findings) else 1)


def views(length: int) -> Finding:
    """The parallel, chunked and step forms of a layer of S4's size, in float64."""
    import torch

    from onchip.nn.mixers import S4

    torch.manual_seed(0)
    mixer, x = S4(16, 64).double(), torch.randn(1, length, 16, dtype=torch.float64)
    with torch.no_grad():
        parallel, outputs, state = mixer(x), [], mixer.initial_state(1)
        for x_t in x[:, : length // 2].unbind(1):
            y_t, state = mixer.step(x_t, state)
            outputs.append(y_t[:, None])
        chunk, _ = mixer(x[:, length // 2 :], state)
    error = (torch.cat([*outputs, chunk], dim=1) - parallel).abs().max().item()
    return Finding(
        "in parallel, in chunks and step by step a layer computes the same",
        f"half of {length} tokens in steps, half as a chunk: at most {error:.0e} off, in float64",
        error < EXACT,
    )


def kernels(length: int) -> Finding:
    """S4's kernel against that of the HiPPO matrix itself, by its powers."""
    import torch

    from onchip.nn import hippo
    from onchip.nn.state_space import LinearSystem, LowRankSystem

    torch.manual_seed(0)
    N, dt = 64, torch.tensor([0.001, 0.01, 0.1], dtype=torch.float64)
    form, C = hippo.low_rank("legs", N), torch.randn(3, N, dtype=torch.float64)
    Lambda, P, B = (z.expand(3, *z.shape) for z in (form.Lambda, form.P.mT, form.B))
    cauchy = LowRankSystem.bilinear(Lambda, P, B, C.to(form.V.dtype) @ form.V, dt).kernel(length)
    krylov = LinearSystem(*hippo.discretize(*hippo.transition("legs", N), dt), C).kernel(length)
    error = ((cauchy - krylov).abs().amax(-1) / krylov.abs().amax(-1)).max().item()
    return Finding(
        "the kernel by a Cauchy matrix is that of the HiPPO matrix by its powers",
        f"N 64, L {length}: at most {error:.0e} of its largest entry off, in float64",
        error < EXACT,
    )


def model(mixer: Mapping[str, object]) -> "LanguageModel":
    """A language model of bytes with these mixers."""
    from onchip.models import LanguageModel, ModelConfig

    return LanguageModel(ModelConfig(vocab_size=256, d_model=D_MODEL, layers=[mixer] * DEPTH, d_mlp=4 * D_MODEL))


class Decoding:
    """A model that reads one token after another."""

    def __init__(self, model: "LanguageModel", state: "ModelState") -> None:
        import torch

        self.model, self.state, self.token = model, state, torch.zeros(BATCH, dtype=torch.int64)

    def __call__(self) -> None:
        """One step."""
        _, self.state = self.model.step(self.token, self.state)


def measure_steps(contexts: Sequence[int], seconds: float) -> Steps:
    """Both models' steps after each context, in turns."""
    import torch

    from onchip.bench.timing import Candidate, interleave, quartiles, ratio
    from onchip.models import ModelState

    s4, attention = model({"mixer": "s4"}), model({"mixer": "attention", "n_heads": 4})
    found = []
    with torch.inference_mode():
        for context in contexts:
            keys = torch.randn(BATCH, context, 4, D_MODEL // 4)
            empty: Any = attention.initial_state(BATCH).layers
            full = ModelState(tuple(layer.joined(keys, keys) for layer in empty))
            decoding = {"s4": Decoding(s4, s4.initial_state(BATCH)), "attention": Decoding(attention, full)}
            candidates = {name: Candidate(call) for name, call in decoding.items()}
            found.append(interleave(candidates, torch.device("cpu"), seconds=seconds, min_rounds=5))
    return Steps(
        contexts,
        [quartiles(times["s4"]).median for times in found],
        [quartiles(times["attention"]).median for times in found],
        [ratio(times["attention"], times["s4"]) for times in found],
    )


def generation(steps: Steps) -> Finding:
    """Whether S4's steps stay as they are while attention's grow, until the published factor lies between."""
    last = steps.speedup[-1].median
    growth = steps.s4[-1] / steps.s4[0], steps.attention[-1] / steps.attention[0]
    return Finding(
        f"generation is {PUBLISHED_SPEEDUP} times faster: a step costs the same at any context",
        f"{last:.0f} times at {steps.contexts[-1]} tokens, {steps.speedup[0].median:.1f} at {steps.contexts[0]}; "
        f"from one to the other S4's steps take {growth[0]:.1f} times as long, attention's {growth[1]:.0f} times",
        last >= PUBLISHED_SPEEDUP and growth[0] < 2,
    )


def learn(epochs: int, d_model: int) -> dict[str, list[float]]:
    """Test accuracy on sequential digits after each epoch."""
    import digits

    from onchip.nn.mixers import S4

    return {
        "S4": digits.accuracies(lambda n: S4(n, 32, dt_min=0.01, dt_max=0.5), epochs, d_model),
        "without memory": digits.accuracies(digits.Memoryless, epochs, d_model),
    }


def classification(learned: Mapping[str, Sequence[float]]) -> Finding:
    """Whether S4 classifies what cannot be classified without memory."""
    s4, none = learned["S4"][-1], learned["without memory"][-1]
    return Finding(
        "images are classified pixel by pixel",
        f"{s4:.1%} of 360 digits, without memory {none:.1%}",
        s4 >= ACCURACY and none < WITHOUT_MEMORY,
    )


def draw(steps: Steps, learned: Mapping[str, Sequence[float]], out: Path) -> Path:
    """Seconds a step over the context, and accuracy over the epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for times, label, color in ((steps.attention, "attention", RED), (steps.s4, "S4", BLUE)):
        left.plot(steps.contexts, [1e3 * t for t in times], "o-", color=color)
        left.annotate(
            label,
            (steps.contexts[-1], 1e3 * times[-1]),
            color=color,
            xytext=(0, 7),
            textcoords="offset points",
            ha="right",
        )
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xticks(steps.contexts, [f"{c}" if c < 1024 else f"{c // 1024}k" for c in steps.contexts])
    left.minorticks_off()
    left.margins(y=0.15)
    left.set_xlabel("context, tokens")
    left.set_ylabel("milliseconds a step")
    for label, color in (("S4", BLUE), ("without memory", RED)):
        values = [100 * x for x in learned[label]]
        right.plot(range(1, len(values) + 1), values, "o-" if len(values) == 1 else "-", color=color)
        right.annotate(
            label, (len(values), values[-1]), color=color, xytext=(0, -15), textcoords="offset points", ha="right"
        )
    right.axhline(100 * ACCURACY, color="#8a8a8a", linewidth=0.8, linestyle=":")
    right.set_ylim(0, 102)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_xlabel("epoch")
    right.set_ylabel("sequential digits, % right")
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"S4's claims, measured on this CPU: {BATCH} sequences a step, and digits pixel by pixel", fontsize=11
    )
    out.mkdir(parents=True, exist_ok=True)
    path = out / "s4.png"
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    typer.run(main)
