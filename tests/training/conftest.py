"""A corpus and a run small enough to repeat often."""

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from onchip.data import Corpus, Document
from onchip.models import ModelConfig
from onchip.training import RunFolder, TrainConfig, Trainer

MODEL = ModelConfig(vocab_size=257, d_model=16, layers=[{"mixer": "attention", "n_heads": 2}], d_mlp=32)
CONFIG = TrainConfig(
    model=MODEL,
    steps=8,
    batch=4,
    context=16,
    lr=1e-2,
    warmup=2,
    evaluate_every=3,
    evaluate_windows=2,
    checkpoint_every=2,
)
TEXT = b"the quick brown fox jumps over the lazy dog and runs away from the slow brown bear. "
CORPUS = Corpus.split([Document(f"{i}.txt", TEXT[i:] + TEXT[:i]) for i in range(30)])


@pytest.fixture
def config() -> TrainConfig:
    return CONFIG


@pytest.fixture
def corpus() -> Corpus:
    return CORPUS


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """`trainer("name", steps=3)`: the run in that folder, new or resumed, with those settings changed."""

    def make(name: str = "run", **changes: object) -> Trainer:
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir(exist_ok=True)
        return Trainer(dataclasses.replace(CONFIG, **changes), CORPUS, folder)  # type: ignore[arg-type]

    return make


@pytest.fixture
def disk_full_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`disk_full_at(3)`: from now on the third thing brought to the disk no longer fits."""
    fsync, left = os.fsync, [0]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    def arm(point: int) -> None:
        left[0] = point
        monkeypatch.setattr(os, "fsync", full)

    return arm
