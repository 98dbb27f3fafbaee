"""Runs with a name: settings that were measured to go together."""

from __future__ import annotations

from onchip.data import ByteTokenizer
from onchip.models import ModelConfig
from onchip.training.config import TrainConfig


def _model(*, d_model: int, n_layers: int, n_heads: int) -> ModelConfig:
    """Attention throughout; the MLP's width makes it as large as two plain layers of 4 × d_model, in steps of 32."""
    return ModelConfig(
        vocab_size=ByteTokenizer.vocab_size,
        d_model=d_model,
        layers=[{"mixer": "attention", "n_heads": n_heads}] * n_layers,
        d_mlp=-(-8 * d_model // 3 // 32) * 32,
    )


PRESETS = {
    "tiny": TrainConfig(
        model=_model(d_model=32, n_layers=2, n_heads=2),
        steps=60,
        batch=8,
        context=64,
        lr=1e-2,
        warmup=10,
        evaluate_every=20,
        evaluate_windows=32,
        checkpoint_every=20,
    ),
    # Few windows a step and many steps: this early, twice the steps teach more than a gradient half as noisy.
    "demo": TrainConfig(
        model=_model(d_model=128, n_layers=4, n_heads=2),
        steps=2000,
        batch=4,
        context=256,
        lr=3e-3,
        warmup=200,
        evaluate_every=200,
        evaluate_windows=64,
        checkpoint_every=200,
    ),
    "small": TrainConfig(
        model=_model(d_model=192, n_layers=5, n_heads=3),
        steps=3600,
        batch=4,
        context=512,
        lr=2e-3,
        warmup=200,
        evaluate_every=300,
        evaluate_windows=64,
        checkpoint_every=300,
    ),
}
"""`tiny` takes seconds and shows that all works; `demo` about 5 minutes on two cores, `small` half an hour."""
