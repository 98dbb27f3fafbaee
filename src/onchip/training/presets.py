"""Runs with a name: settings that were measured to go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onchip.data import ByteTokenizer
from onchip.models import ModelConfig
from onchip.training.config import TrainConfig


def _model(layers: Sequence[Mapping[str, Any]], *, d_model: int, mlp: bool) -> ModelConfig:
    """The MLPs' width makes them as large as two plain layers of 4 × d_model, in steps of 32."""
    d_mlp = -(-8 * d_model // 3 // 32) * 32 if mlp else None
    return ModelConfig(vocab_size=ByteTokenizer.vocab_size, d_model=d_model, layers=layers, d_mlp=d_mlp)


def _attention(*, d_model: int, n_layers: int, n_heads: int) -> ModelConfig:
    return _model([{"mixer": "attention", "n_heads": n_heads}] * n_layers, d_model=d_model, mlp=True)


def _demo(model: ModelConfig) -> TrainConfig:
    """Few windows a step and many steps: this early, twice the steps teach more than a gradient half as noisy."""
    return TrainConfig(
        model=model,
        steps=2000,
        batch=4,
        context=256,
        lr=3e-3,
        warmup=200,
        evaluate_every=200,
        evaluate_windows=64,
        checkpoint_every=200,
    )


_MAMBA, _MAMBA2, _ATTENTION = {"mixer": "mamba"}, {"mixer": "mamba2"}, {"mixer": "attention", "n_heads": 2}
# As many numbers in each, within 2 %. Mamba's layers have their gate within and no MLP; the hybrid's attention is in
# its second layer and half of the layers later, as in H3 (arXiv 2212.14052, section 5).
_FAMILIES = {
    "attention": _attention(d_model=128, n_layers=4, n_heads=2),
    "mamba": _model([_MAMBA] * 7, d_model=128, mlp=False),
    "mamba2": _model([_MAMBA2] * 6, d_model=128, mlp=False),
    "hybrid": _model(
        [_MAMBA2, _ATTENTION, _MAMBA2, _MAMBA2, _ATTENTION, _MAMBA2, _MAMBA2],
        d_model=128,
        mlp=False,
    ),
}

PRESETS = {
    "tiny": TrainConfig(
        model=_attention(d_model=32, n_layers=2, n_heads=2),
        steps=60,
        batch=8,
        context=64,
        lr=1e-2,
        warmup=10,
        evaluate_every=20,
        evaluate_windows=32,
        checkpoint_every=20,
    ),
    "demo": _demo(_FAMILIES["attention"]),
    "small": TrainConfig(
        model=_attention(d_model=192, n_layers=5, n_heads=3),
        steps=3600,
        batch=4,
        context=512,
        lr=2e-3,
        warmup=200,
        evaluate_every=300,
        evaluate_windows=64,
        checkpoint_every=300,
    ),
    **{name: _demo(model) for name, model in _FAMILIES.items()},
}
"""`tiny` takes seconds and shows that all works; `demo` about 5 minutes on two cores, `small` half an hour.

`attention`, `mamba`, `mamba2` and `hybrid` are of demo's size and learn from the same text in the same order, to be
compared.
"""
