"""What a training run is: every setting that has a say in its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from onchip.models import ModelConfig

Precision = Literal["auto", "float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a run. Runs with equal settings, corpora and thread counts end with equal weights, bit for bit.

    model             the model to train
    steps             optimiser steps in the whole run
    batch             windows per step, over all processes and all accumulated parts
    context           tokens per window; nothing is learnt about longer distances
    lr                peak learning rate: reached after `warmup` steps, down to zero on a cosine
    warmup            steps of linear growth
    weight_decay      decoupled, on matrices only: not on norms, embeddings, biases
    clip              largest norm of the gradient; a longer one is scaled down
    accumulate        parts in which a batch is computed, one after the other, to save memory
    seed              of the weights and of the order of the text
    precision         of the matrix products; "auto" takes bfloat16 where the device computes it natively
    evaluate_every    steps between two looks at `evaluate_windows` windows of the held-out text
    checkpoint_every  steps between two checkpoints

    Raises `ValueError` or `TypeError` where a setting is out of its range or of another type.
    """

    model: ModelConfig
    steps: int
    batch: int
    context: int
    lr: float
    warmup: int
    weight_decay: float = 0.1
    clip: float = 1.0
    accumulate: int = 1
    seed: int = 0
    precision: Precision = "auto"
    evaluate_every: int
    evaluate_windows: int
    checkpoint_every: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                least = 0 if field.name in ("warmup", "seed") else 1
                if not isinstance(value, int) or isinstance(value, bool):
                    raise TypeError(f"{field.name}: expected a whole number, and got {value!r}")
                if value < least:
                    raise ValueError(f"{field.name}: expected {least} or more, and got {value}")
            if field.type == "float":
                if not isinstance(value, int | float) or isinstance(value, bool):
                    raise TypeError(f"{field.name}: expected a number, and got {value!r}")
                if not 0 <= value < float("inf"):
                    raise ValueError(f"{field.name}: expected a finite number, 0 or more, and got {value}")
        if self.batch % self.accumulate:
            raise ValueError(f"batch: expected a multiple of accumulate = {self.accumulate}, and got {self.batch}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision: expected auto, float32 or bfloat16, and got {self.precision!r}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimiser step learns from."""
        return self.batch * self.context

    def lasting(self, steps: int) -> TrainConfig:
        """The same run over another number of steps: warm-up, evaluations and checkpoints keep their places in it."""

        def scaled(value: int, least: int) -> int:
            return max(least, round(value * steps / self.steps))

        return dataclasses.replace(
            self,
            steps=steps,
            warmup=scaled(self.warmup, 0),
            evaluate_every=scaled(self.evaluate_every, 1),
            checkpoint_every=scaled(self.checkpoint_every, 1),
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON takes them."""
        fields = (field.name for field in dataclasses.fields(self) if field.name != "model")
        return {"model": self.model.to_dict()} | {name: getattr(self, name) for name in fields}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`. Raises `ValueError` where a setting is missing or unknown."""
        names = {field.name for field in dataclasses.fields(cls)}
        if wrong := sorted(names.symmetric_difference(settings)):
            raise ValueError(f"training settings: expected {', '.join(sorted(names))}; missing or unknown: {wrong}")
        return cls(**{**settings, "model": ModelConfig.from_dict(settings["model"])})

    def differences(self, other: TrainConfig) -> list[str]:
        """The settings in which `other` is another one, as people read them: `lr 0.001, not 0.002`."""
        ours, theirs = _flat(self.to_dict()), _flat(other.to_dict())
        names = [*ours, *(name for name in theirs if name not in ours)]
        return [
            f"{name} {ours.get(name, 'absent')}, not {theirs.get(name, 'absent')}"
            for name in names
            if ours.get(name) != theirs.get(name)
        ]


def _flat(settings: Any, name: str = "") -> dict[str, Any]:
    """Settings within settings as one level of dotted names."""
    if not isinstance(settings, Mapping | list):
        return {name: settings}
    items = settings.items() if isinstance(settings, Mapping) else enumerate(settings)
    prefix = f"{name}." if name else ""
    return {inner: value for key, part in items for inner, value in _flat(part, f"{prefix}{key}").items()}
