"""Pictures of what a model does. They need matplotlib: `pip install onchip[plot]`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onchip._files import atomic_write
from onchip.data import ByteTokenizer
from onchip.models import LanguageModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST_LABELLED = 48
"""Texts of more tokens have numbers along the edges, not characters."""
_GLYPHS = {ByteTokenizer.boundary_id: "▷", ord("\n"): "↵", ord("\t"): "→", ord(" "): "␣"}
MOST_HEADS = 8
"""Of a layer with more heads so many are drawn, from the one that looks back least to the one that looks furthest."""
_KEY = (
    "A row is the token being computed, its dark squares are the tokens it draws on. "
    "In the corner: the head, and how far back they lie, on average."
)
_INK, _FAINT, _HIDDEN = "#1f2933", "#627d98", "#eef1f5"


def draw_mixing_matrices(model: LanguageModel, text: str | bytes | Sequence[int], path: str | Path) -> None:
    """Draw the mixing matrices of every layer of `model` on `text`, as one PNG.

    A row of squares per layer, a square per head. In a square, row i is the token being computed and column j a token
    that it draws on; short texts have their characters along the edges. In the corner are the head's number, from 1,
    and the mean distance that it looks back. Of a layer with more heads than `MOST_HEADS`, such as Mamba's, where every
    channel is one, those are drawn that divide its heads evenly, put in order by that distance. Colours are relative to
    the largest weight of the square, as a head of a state space has no scale of its own.

    Args:
        model: a language model of bytes.
        text: at most some hundreds of bytes, drawn as the beginning of a document; or token ids, drawn as they are.
        path: where the picture goes; replaced as a whole or not at all. Memory is quadratic in the text's length.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
        ValueError: `text` has no token, or one that the model does not know.
        OSError: `path` cannot be written.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import FuncNorm
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a picture needs matplotlib: pip install onchip[plot]") from None
    tokens = _tokens(text, model.config.vocab_size)
    layers = _layers(model, tokens)

    signed = any(head.weights.min() < 0 for layer in layers for head in layer.heads)
    norm = FuncNorm((_root, _square), -1.0 if signed else 0.0, 1.0)
    colours = ScalarMappable(norm, colormaps["RdBu_r" if signed else "magma_r"].with_extremes(bad=_HIDDEN))
    n_rows, n_columns = len(layers), max(len(layer.heads) for layer in layers)
    side = max(1.0, min(3.4, 16 / max(n_rows, n_columns)))
    width = n_columns * side + 1.6
    zoom = max(1.0, width / 10)  # of the words around the squares: a large picture is looked at from further away
    figure = Figure(figsize=(width, n_rows * side + 1.4), dpi=150, layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False)
    for i, layer in enumerate(layers):
        for j, panel in enumerate(panels[i]):
            if j < len(layer.heads):
                _draw_panel(panel, layer.heads[j], colours)
                _label_tokens(panel, tokens, side, left=j == 0, below=i == n_rows - 1)
            else:
                panel.set_axis_off()
        name = _describe(model.config.layers[i], len(layer.heads), layer.total)
        panels[i, 0].set_ylabel(f"layer {i + 1}\n{name}", color=_INK, fontsize=9 * zoom)
    bar = figure.colorbar(colours, ax=panels, shrink=0.5, aspect=30, pad=0.01)
    bar.set_label("weight over the largest (colour grows with its square root)", color=_INK, fontsize=8 * zoom)
    bar.ax.tick_params(labelsize=7, colors=_FAINT)
    figure.suptitle(
        textwrap.fill(_title(tokens), int(8 * width / zoom)), color=_INK, fontsize=13 * zoom, parse_math=False
    )
    figure.supxlabel(textwrap.fill(_KEY, int(13 * width / zoom)), color=_FAINT, fontsize=9 * zoom)
    with atomic_write(Path(path)) as temporary:
        figure.savefig(temporary, format="png")


def _tokens(text: str | bytes | Sequence[int], vocab_size: int) -> list[int]:
    boundary = ByteTokenizer.boundary_id
    if isinstance(text, str | bytes) and vocab_size > ByteTokenizer.vocab_size:
        raise ValueError(f"text must be given as tokens to a model of {vocab_size}, which is not one of bytes")
    tokens = [boundary, *ByteTokenizer().encode(text)] if isinstance(text, str | bytes) else list(text)
    if not tokens:
        raise ValueError("text must have at least one token, got none")
    if not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise ValueError(f"text must have tokens from 0 to {vocab_size - 1}, got {min(tokens)} to {max(tokens)}")
    return tokens


class _Head(NamedTuple):
    """A matrix to draw, divided by its largest entry; `number` counts from 1."""

    number: int
    back: float
    weights: NDArray[np.float32]


class _Layer(NamedTuple):
    """What is drawn of a layer's `total` heads."""

    heads: list[_Head]
    total: int


@torch.inference_mode()
def _layers(model: LanguageModel, tokens: list[int]) -> list[_Layer]:
    """A layer at a time: a state space may have thousands of heads."""
    batch = torch.tensor([tokens], device=model.device)
    return [_chosen(matrices[0].float()) for matrices in model.matrices(batch)]


def _chosen(matrices: Tensor) -> _Layer:
    """At most `MOST_HEADS` of `matrices (H, T, T)`."""
    time, weights = torch.arange(matrices.shape[-1], device=matrices.device), matrices.abs()
    back = (weights * (time[:, None] - time)).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1e-30)
    chosen = torch.arange(len(matrices), device=matrices.device)
    if len(chosen) > MOST_HEADS:
        chosen = back.argsort()[torch.linspace(0, len(chosen) - 1, MOST_HEADS, device=back.device).round().long()]
    drawn = matrices[chosen] / weights[chosen].amax((1, 2), keepdim=True).clamp(min=1e-30)
    heads = zip(chosen.tolist(), back[chosen].tolist(), drawn.cpu().numpy(), strict=True)
    return _Layer([_Head(index + 1, distance, matrix) for index, distance, matrix in heads], len(matrices))


def _draw_panel(panel: Axes, head: _Head, colours: Any) -> None:
    past = np.ma.masked_array(head.weights, mask=np.triu(np.ones(head.weights.shape, dtype=bool), 1))
    panel.imshow(past, norm=colours.norm, cmap=colours.cmap)
    corner = f"{head.number}: {head.back:.1f} back"
    panel.text(0.97, 0.96, corner, transform=panel.transAxes, ha="right", va="top", color=_FAINT, fontsize=8)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0, labelsize=8, colors=_INK)


def _label_tokens(panel: Axes, tokens: list[int], side: float, left: bool, below: bool) -> None:
    T = len(tokens)
    at = list(range(T)) if T <= LONGEST_LABELLED else list(range(0, T, max(1, 10 ** (len(str(T)) - 2) * 5)))
    labels = [_glyph(token) for token in tokens] if T <= LONGEST_LABELLED else [str(t) for t in at]
    panel.set_xticks(at if below else [], labels if below else [])
    panel.set_yticks(at if left else [], labels if left else [])
    if T <= LONGEST_LABELLED:
        panel.tick_params(labelsize=min(9.0, 60 * side / T), labelfontfamily="monospace", pad=1)


def _glyph(token: int) -> str:
    """One token as a label: itself where it can be seen, a byte in hexadecimal where it is part of a character."""
    if token in _GLYPHS:
        return _GLYPHS[token]
    return chr(token) if 32 < token < 127 else f"{token:02x}"


def _describe(options: Mapping[str, Any], drawn: int, total: int) -> str:
    window = options.get("window")
    reach = "" if window is None or window[0] is None else f", window {window[0]}"
    return f"{options['mixer']}{reach}" + (f"\n{drawn} of {total}" if drawn < total else "")


def _title(tokens: list[int]) -> str:
    text = ByteTokenizer().decode(tokens).decode("utf-8", "replace")
    # Of the scripts that the font may lack, and of what cannot be printed, only the place is shown.
    shown = "".join(c if c.isspace() or (c.isprintable() and c < "\u0250") else "□" for c in text)
    return f"What each head mixes in “{textwrap.shorten(shown, 48, placeholder=' …')}”"


def _root(x: Any) -> Any:
    return np.sign(x) * np.sqrt(np.abs(x))


def _square(x: Any) -> Any:
    return np.sign(x) * np.square(x)
