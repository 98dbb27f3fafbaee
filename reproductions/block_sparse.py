"""Block-sparse FlashAttention (Dao et al. 2022, arXiv 2205.14135, §3.3): time in proportion to the density of the mask.

The paper claims of attention under a mask of tiles:
  1. It computes the attention of that mask, exactly.
  2. Its cost is that of full attention times the part of the tiles that is not masked (proposition 4; in figure 2 on
     the right the forward pass's time falls in proportion).

Here both are measured for `onchip.attention` on this machine, the second forward and backward, and each passes or
fails by itself. At density d the time may be d + 0.05 of full attention's, without a mask, in the same rounds. The
masks are of tiles of 128: chosen at random, with which neighbouring rows share little; the butterfly of the paper's
block-sparse models; and a window with global tokens, whose tiles at the edges are seen in part. float32 on a CPU,
bfloat16 on a GPU.

    python reproductions/block_sparse.py             about two minutes
    python reproductions/block_sparse.py --quick     a short sequence: it runs, and says little
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onchip.bench import machine

if TYPE_CHECKING:
    from torch import Tensor

    from onchip import BlockMask
    from onchip.bench.cases import Device
    from onchip.bench.timing import Quartiles

PASSES = ("forward", "backward")
COLORS = {"forward": "#3b6fb6", "backward": "#d1582f"}
MARKERS = {"random": "o", "butterfly": "D", "window": "s"}
DENSITIES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
BLOCK = 128
OVERHEAD = 0.05  # of full attention's time, beyond the density


@dataclass(frozen=True)
class Finding:
    """A claim and what became of it."""

    claim: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class Point:
    """A mask, its density, and the time under it by pass, as a part of full attention's."""

    mask: str
    density: float
    cost: dict[str, "Quartiles"]


def main(
    out: Annotated[Path, typer.Option(help="Folder for the plot.")] = Path("runs/reproductions"),
    quick: Annotated[bool, typer.Option("--quick", help="A short sequence.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Not on the GPU, where there is one.")] = False,
) -> None:
    """Measure the claims of block-sparse FlashAttention on this machine. Exit code 0 if all hold, else 1."""
    if dict(os.environ) != machine.environment("tuned"):
        os.execve(sys.executable, [sys.executable, *sys.argv], machine.environment("tuned"))
    import torch
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(machine.cores())
    device: Device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    points = measure(1024 if quick else 8192, device, 1.0 if quick else 90.0)
    findings = [exact(errors(512)), *(proportional(points, name) for name in PASSES)]

    console = Console()
    figures = Table("mask", "density", *PASSES)
    for at in points:
        figures.add_row(at.mask, f"{at.density:.3f}", *(f"{at.cost[name].median:.3f}" for name in PASSES))
    verdicts = Table("claim", "measured here", "")
    for finding in findings:
        verdicts.add_row(finding.claim, finding.measured, "[green]PASS" if finding.holds else "[red]FAIL")
    console.print("Time under a mask, full attention = 1", figures, verdicts)
    print(draw(points, machine.describe(device, "tuned").name, out))
    raise typer.Exit(0 if all(finding.holds for finding in findings) else 1)


def masks(length: int) -> dict[str, "BlockMask"]:
    """The masks by name, of which the first word says the kind."""
    import torch

    from onchip import BlockMask

    tiles = length // BLOCK
    rank = torch.randperm(tiles**2, generator=torch.Generator().manual_seed(0)).view(tiles, tiles)
    found = {}
    for density in DENSITIES:
        chosen = (rank < density * tiles**2).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        found[f"random {density:.2f}"] = BlockMask.from_dense(chosen)
    found["butterfly"] = BlockMask.butterfly(length)
    found["window and global"] = BlockMask.local(length, length, window=(length // 16,) * 2, n_global=BLOCK // 2)
    return found


def measure(length: int, device: "Device", seconds: float) -> list[Point]:
    """Both passes under each mask and under none, in turns."""
    import torch

    from onchip.bench.timing import Candidate, interleave, ratio

    here = torch.device(device)
    heads, dim, dtype = (2, 64, torch.float32) if device == "cpu" else (16, 128, torch.bfloat16)
    made = masks(length)
    inputs = torch.randn(3, 1, length, heads, dim, device=here).to(dtype).unbind(0)
    found: dict[str, dict[str, Quartiles]] = {name: {} for name in made}
    for of, make in zip(PASSES, (forward, backward), strict=True):
        candidates = {"full": Candidate(make(inputs, None))}
        candidates |= {name: Candidate(make(inputs, mask.to(here))) for name, mask in made.items()}
        times = interleave(candidates, here, seconds=seconds / 2, min_rounds=3)
        for name in made:
            found[name][of] = ratio(times[name], times["full"])
    return [Point(name, mask.density, found[name]) for name, mask in made.items()]


def forward(inputs: Sequence["Tensor"], mask: "BlockMask | None") -> Callable[[], object]:
    """A call of the forward pass."""
    import onchip

    q, k, v = inputs
    return lambda: onchip.attention(q, k, v, block_mask=mask)


def backward(inputs: Sequence["Tensor"], mask: "BlockMask | None") -> Callable[[], object]:
    """A call of the backward pass by itself."""
    import torch

    leaves = [x.detach().requires_grad_() for x in inputs]
    out = forward(leaves, mask)()
    assert isinstance(out, torch.Tensor)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def errors(length: int) -> dict[str, tuple[float, float]]:
    """By mask the largest error of the output, ours and that of PyTorch under the mask written out, in float32."""
    import torch

    import onchip

    q, k, v = torch.randn(3, 1, length, 2, 64, dtype=torch.float64).unbind(0)
    found = {}
    for name, mask in masks(length).items():
        dense = mask.to_dense() | torch.eye(length, dtype=torch.bool)  # where a row sees nothing PyTorch gives NaN
        exact_mask = onchip.BlockMask.from_dense(dense)
        want = onchip.attention(q, k, v, block_mask=exact_mask, backend="reference")
        x = [x.float() for x in (q, k, v)]
        ours = onchip.attention(x[0], x[1], x[2], block_mask=exact_mask)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            by_head = [y.transpose(1, 2) for y in x]
            eager = torch.nn.functional.scaled_dot_product_attention(by_head[0], by_head[1], by_head[2], dense)
        found[name] = ((ours - want).abs().max().item(), (eager.transpose(1, 2) - want).abs().max().item())
    return found


def exact(found: dict[str, tuple[float, float]]) -> Finding:
    """Whether the error is at most twice that of standard attention and a few roundings of one, under every mask."""
    name, (ours, eager) = max(found.items(), key=lambda item: item[1][0] - 2 * item[1][1])
    return Finding(
        "the output is that of attention under the same mask",
        f"largest error {ours:.1e}, standard attention's {eager:.1e} ({name})",
        ours <= 2 * eager + 4 * 2**-23,
    )


def proportional(points: Sequence[Point], name: str) -> Finding:
    """Whether no mask costs more than its density, and the overhead, of full attention."""
    worst = max(points, key=lambda at: at.cost[name].median - at.density)
    cost = worst.cost[name].median
    return Finding(
        f"the {name} pass at density d takes at most d + {OVERHEAD} of the full one's time",
        f"d {cost - worst.density:+.3f} at most ({worst.mask}, d {worst.density:.3f})",
        cost <= worst.density + OVERHEAD,
    )


def draw(points: Sequence[Point], name: str, out: Path) -> Path:
    """Time over density, a panel a pass, with the line of d + 0.05."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for panel, of in zip(figure.subplots(1, 2, sharey=True), PASSES, strict=True):
        panel.plot([0, 1], [0, 1], color="#8a8a8a", linewidth=1, label="d")
        panel.plot([0, 1], [OVERHEAD, 1 + OVERHEAD], color="#8a8a8a", linewidth=1, linestyle="--", label="d + 0.05")
        for kind, marker in MARKERS.items():
            chosen = sorted((at for at in points if at.mask.startswith(kind)), key=lambda at: at.density)
            low, median, high = zip(*(at.cost[of] for at in chosen), strict=True)
            densities = [at.density for at in chosen]
            reach = [
                [m - a for m, a in zip(median, low, strict=True)],
                [b - m for m, b in zip(median, high, strict=True)],
            ]
            panel.errorbar(
                densities, median, reach, fmt=marker, markersize=5, color=COLORS[of], capsize=2,
                mfc=COLORS[of] if kind == "random" else "white", label=chosen[0].mask if len(chosen) == 1 else kind,
            )  # fmt: skip
        panel.set_title(of, fontsize=10)
        panel.set_xlabel("density d: part of the tiles that is computed")
        panel.set_xlim(0, 0.85)
        panel.set_ylim(0, 0.95)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
        if of == PASSES[0]:
            panel.set_ylabel("time, full attention = 1")
    figure.suptitle(f"Block-sparse FlashAttention's claim, measured on {name}", fontsize=11)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "block_sparse.png"
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    typer.run(main)
