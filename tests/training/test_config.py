"""Settings: read back as written, refused where they make no sense, compared by name."""

import dataclasses
import json

import pytest

from onchip.models import LanguageModel
from onchip.training import PRESETS, TrainConfig


@pytest.mark.parametrize("name", PRESETS)
def test_settings_come_back_from_json_as_they_were(name: str) -> None:
    config = PRESETS[name]
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_families_compare_at_one_size_and_budget() -> None:
    families = [PRESETS[name] for name in ("attention", "mamba", "mamba2", "hybrid")]
    assert PRESETS["attention"] == PRESETS["demo"]
    assert len({(config.steps, config.batch, config.context) for config in families}) == 1
    sizes = [LanguageModel(config.model).num_parameters for config in families]
    assert max(sizes) <= 1.02 * min(sizes)
    mixers = [{layer["mixer"] for layer in config.model.layers} for config in families]
    assert mixers == [{"attention"}, {"mamba"}, {"mamba2"}, {"mamba2", "attention"}]


@pytest.mark.parametrize(
    ("setting", "value", "error"),
    [
        ("steps", 0, "steps: expected 1 or more, and got 0"),
        ("batch", -1, "batch: expected 1 or more"),
        ("context", 2.5, "context: expected a whole number, and got 2.5"),
        ("warmup", -1, "warmup: expected 0 or more"),
        ("seed", True, "seed: expected a whole number"),
        ("lr", float("nan"), "lr: expected a finite number"),
        ("lr", "fast", "lr: expected a number, and got 'fast'"),
        ("weight_decay", -0.1, "weight_decay: expected a finite number, 0 or more"),
        ("accumulate", 3, "batch: expected a multiple of accumulate = 3, and got 4"),
        ("precision", "float8", "precision: expected auto, float32 or bfloat16"),
    ],
)
def test_a_setting_out_of_range_is_named(config: TrainConfig, setting: str, value: object, error: str) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        dataclasses.replace(config, **{setting: value})  # type: ignore[arg-type]


def test_missing_and_unknown_settings_are_named(config: TrainConfig) -> None:
    settings = config.to_dict()
    with pytest.raises(ValueError, match="momentum"):
        TrainConfig.from_dict(settings | {"momentum": 0.9})
    del settings["lr"]
    with pytest.raises(ValueError, match="'lr'"):
        TrainConfig.from_dict(settings)


def test_differences_name_the_settings(config: TrainConfig) -> None:
    model = dataclasses.replace(config.model, layers=[{"mixer": "attention", "n_heads": 1}], d_mlp=64)
    assert config.differences(config) == []
    assert config.differences(dataclasses.replace(config, lr=0.5, model=model)) == [
        "model.layers.0.n_heads 2, not 1",
        "model.d_mlp 32, not 64",
        "lr 0.01, not 0.5",
    ]


def test_a_longer_run_stretches_its_landmarks(config: TrainConfig) -> None:
    assert config.lasting(config.steps) == config
    longer = config.lasting(80)
    assert (longer.steps, longer.warmup, longer.evaluate_every, longer.checkpoint_every) == (80, 20, 30, 20)
    shorter = config.lasting(1)
    assert (shorter.steps, shorter.evaluate_every, shorter.checkpoint_every) == (1, 1, 1)
