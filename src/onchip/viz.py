"""Pictures of what a model does. They need matplotlib: `pip install onchip[plot]`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from onchip._files import atomic_write
from onchip.data import ByteTokenizer
from onchip.models import LanguageModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST_LABELLED = 48
"""Texts of more tokens have numbers along the edges, not characters."""
_GLYPHS = {ByteTokenizer.boundary_id: "▷", ord("\n"): "↵", ord("\t"): "→", ord(" "): "␣"}
_KEY = (
    "A row is the token being computed, its dark squares are the tokens it draws on. "
    "The number in the corner is how far back they lie, on average."
)
_INK, _FAINT, _HIDDEN = "#1f2933", "#627d98", "#eef1f5"


def draw_mixing_matrices(model: LanguageModel, text: str | bytes | Sequence[int], path: str | Path) -> None:
    """Draw the mixing matrix of every layer and head of `model` on `text`, as one PNG.

    A row of squares per layer, a square per head. In a square, row i is the token being computed and column j a token
    that it draws on; short texts have their characters along the edges. The number in the corner is the mean distance
    that the head looks back.

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
    layers = _matrices(model, tokens)

    highest = max(float(np.abs(layer).max()) for layer in layers)
    signed = any(layer.min() < 0 for layer in layers)
    norm = FuncNorm((_root, _square), -highest if signed else 0.0, highest)
    colours = ScalarMappable(norm, colormaps["RdBu_r" if signed else "magma_r"].with_extremes(bad=_HIDDEN))
    n_rows, n_columns = len(layers), max(len(layer) for layer in layers)
    side = max(1.0, min(3.4, 16 / max(n_rows, n_columns)))
    width = n_columns * side + 1.6
    zoom = max(1.0, width / 10)  # of the words around the squares: a large picture is looked at from further away
    figure = Figure(figsize=(width, n_rows * side + 1.4), dpi=150, layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False)
    for i, layer in enumerate(layers):
        for j, panel in enumerate(panels[i]):
            if j < len(layer):
                _draw_panel(panel, layer[j], colours)
                _label_tokens(panel, tokens, side, left=j == 0, below=i == n_rows - 1)
            else:
                panel.set_axis_off()
        panels[i, 0].set_ylabel(f"layer {i + 1}\n{_describe(model.config.layers[i])}", color=_INK, fontsize=9 * zoom)
    for j, panel in enumerate(panels[0]):
        panel.set_title(f"head {j + 1}", color=_INK, fontsize=9 * zoom)
    bar = figure.colorbar(colours, ax=panels, shrink=0.5, aspect=30, pad=0.01)
    bar.set_label("weight (colour grows with its square root)", color=_INK, fontsize=8 * zoom)
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


@torch.inference_mode()
def _matrices(model: LanguageModel, tokens: list[int]) -> list[NDArray[np.float32]]:
    batch = torch.tensor([tokens], device=model.device)
    return [matrix[0].float().cpu().numpy() for matrix in model.matrices(batch)]


def _draw_panel(panel: Axes, matrix: NDArray[np.float32], colours: Any) -> None:
    T = len(matrix)
    past = np.ma.masked_array(matrix, mask=np.triu(np.ones((T, T), dtype=bool), 1))
    panel.imshow(past, norm=colours.norm, cmap=colours.cmap)
    weights = np.abs(matrix)
    distance = np.arange(T)[:, None] - np.arange(T)
    back = (weights * distance).sum() / max(weights.sum(), 1e-30)
    panel.text(
        0.97, 0.96, f"{back:.1f} back", transform=panel.transAxes, ha="right", va="top", color=_FAINT, fontsize=8
    )
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


def _describe(layer: Any) -> str:
    window = layer.get("window")
    return layer["mixer"] if window is None or window[0] is None else f"{layer['mixer']}, window {window[0]}"


def _title(tokens: list[int]) -> str:
    text = ByteTokenizer().decode(tokens).decode("utf-8", "replace")
    # Of the scripts that the font may lack, and of what cannot be printed, only the place is shown.
    shown = "".join(c if c.isspace() or (c.isprintable() and c < "\u0250") else "□" for c in text)
    return f"What each head mixes in “{textwrap.shorten(shown, 48, placeholder=' …')}”"


def _root(x: Any) -> Any:
    return np.sign(x) * np.sqrt(np.abs(x))


def _square(x: Any) -> Any:
    return np.sign(x) * np.square(x)
