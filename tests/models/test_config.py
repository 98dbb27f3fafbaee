import json

import pytest

from onchip.models import ModelConfig

VALUES = {"vocab_size": 9, "d_model": 8, "layers": [{"mixer": "attention", "n_heads": 2}], "d_mlp": 16}


def test_a_config_survives_json():
    layers = [{"mixer": "attention", "n_heads": 2, "window": (3, None)}, {"mixer": "attention", "n_heads": 4}]
    config = ModelConfig(**{**VALUES, "layers": layers}, tie_embeddings=False, norm_eps=1e-6)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_keeps_its_own_layers():
    layers = [{"mixer": "attention", "n_heads": 2}]
    config = ModelConfig(**{**VALUES, "layers": layers})
    layers[0]["n_heads"] = 99
    assert config.layers[0]["n_heads"] == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vocab": 3}, ValueError, "has no vocab; it knows vocab_size, d_model"),
        ({"d_mlp": 1.5}, TypeError, "d_mlp must be an integer, got 1.5"),
        ({"d_model": 0}, ValueError, "d_model must be positive, got 0"),
        ({"vocab_size": 2.5}, TypeError, "vocab_size must be an integer, got 2.5"),
        ({"vocab_size": True}, TypeError, "vocab_size must be an integer, got True"),
        ({"tie_embeddings": "yes"}, TypeError, "tie_embeddings must be true or false, got 'yes'"),
        ({"norm_eps": 0}, ValueError, "norm_eps must be a positive number, got 0"),
        ({"layers": "attention"}, TypeError, "layers must be a list"),
        ({"layers": [{"n_heads": 2}]}, ValueError, r"layers\[0\] must be"),
        ({"layers": ["attention"]}, ValueError, r"layers\[0\] must be"),
        ({"layers": [{"mixer": "mamba", "d_mlp": 0}]}, ValueError, r"layers\[0\].d_mlp must be positive, got 0"),
        ({"residual_in_fp32": "yes"}, TypeError, "residual_in_fp32 must be true or false, got 'yes'"),
    ],
)
def test_bad_values(change, error, message):
    with pytest.raises(error, match=message):
        ModelConfig.from_dict({**VALUES, **change})


def test_missing_values_are_named():
    with pytest.raises(ValueError, match="needs d_model, d_mlp"):
        ModelConfig.from_dict({"vocab_size": 3, "layers": []})
    with pytest.raises(TypeError, match="must be an object, got list"):
        ModelConfig.from_dict([])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"norm": "batch"}, ValueError),
        ({"mlp": "relu"}, ValueError),
        ({"mlp_bias": 1}, TypeError),
        ({"positions": 0}, ValueError),
        ({"positions": 2.5}, TypeError),
    ],
)
def test_what_other_families_need_is_checked_too(change, error):
    with pytest.raises(error, match=next(iter(change))):
        ModelConfig(vocab_size=9, d_model=8, layers=[], d_mlp=16, **change)
