import sys

import pytest
import torch

from onchip.models import LanguageModel, ModelConfig
from onchip.viz import MOST_HEADS, _layers, draw_mixing_matrices

pytest.importorskip("matplotlib")
from matplotlib.image import imread


@pytest.fixture
def model():
    layers = [{"mixer": "attention", "n_heads": 2}, {"mixer": "attention", "n_heads": 1, "window": [5, 0]}]
    return LanguageModel(ModelConfig(vocab_size=257, d_model=16, layers=layers, d_mlp=24))


@pytest.mark.parametrize("text", ["$x^2$\n\t 漢字 🎉 é", b"\xff\x00\x1b[31m" * 30, [256]])
def test_any_text_is_drawn(model, tmp_path, text):
    draw_mixing_matrices(model, text, tmp_path / "mixing.png")
    assert [path.name for path in tmp_path.iterdir()] == ["mixing.png"]
    image = imread(tmp_path / "mixing.png")
    assert min(image.shape[:2]) > 400


def test_the_picture_shows_the_matrices(model, tmp_path):
    """Two models whose weights differ give two pictures; the same model gives the same."""
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    draw_mixing_matrices(model, "some text", paths[0])
    draw_mixing_matrices(model, "some text", paths[1])
    with torch.no_grad():
        model.layers[1].mixer.qkv.weight += torch.randn_like(model.layers[1].mixer.qkv.weight)
    draw_mixing_matrices(model, "some text", paths[2])
    first, again, other = (imread(path) for path in paths)
    assert (first == again).all()
    assert first.shape == other.shape and (first != other).any()


def test_matrices_with_negative_entries_are_drawn(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "matrices", lambda tokens: [torch.randn(1, 1, tokens.shape[1], tokens.shape[1])] * 2)
    draw_mixing_matrices(model, "ab", tmp_path / "mixing.png")
    assert imread(tmp_path / "mixing.png").size


def test_of_many_heads_some_are_drawn_from_the_nearest_to_the_furthest(tmp_path):
    layers = [{"mixer": "mamba", "d_state": 4}, {"mixer": "attention", "n_heads": 2}]
    model = LanguageModel(ModelConfig(vocab_size=257, d_model=16, layers=layers, d_mlp=None))
    mamba, attention = _layers(model, list(b"some text"))
    assert (len(mamba.heads), mamba.total, len(attention.heads)) == (MOST_HEADS, 32, 2)
    distances = [head.back for head in mamba.heads]
    assert distances == sorted(distances)
    (matrices, _) = model.matrices(torch.tensor([list(b"some text")]))
    weights, time = matrices[0].abs(), torch.arange(9)
    every = (weights * (time[:, None] - time)).sum((1, 2)) / weights.sum((1, 2))
    torch.testing.assert_close(torch.tensor([distances[0], distances[-1]]), torch.stack([every.min(), every.max()]))
    for head in mamba.heads:
        own = matrices[0, head.number - 1]
        torch.testing.assert_close(torch.from_numpy(head.weights), (own / own.abs().max()).detach())
    draw_mixing_matrices(model, "some text", tmp_path / "mixing.png")
    assert imread(tmp_path / "mixing.png").size


@pytest.mark.parametrize(("tokens", "message"), [([], "at least one token"), ([3, 257], "from 0 to 256, got 3 to 257")])
def test_bad_tokens(model, tmp_path, tokens, message):
    with pytest.raises(ValueError, match=message):
        draw_mixing_matrices(model, tokens, tmp_path / "mixing.png")


def test_text_for_a_model_that_is_not_of_bytes(tmp_path):
    config = ModelConfig(vocab_size=300, d_model=16, layers=[{"mixer": "attention", "n_heads": 2}], d_mlp=24)
    with pytest.raises(ValueError, match="text must be given as tokens to a model of 300"):
        draw_mixing_matrices(LanguageModel(config), "ab", tmp_path / "mixing.png")


def test_without_matplotlib_the_way_to_get_it_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install onchip\[plot\]"):
        draw_mixing_matrices(model, "a", tmp_path / "mixing.png")
