import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from onchip.models import LanguageModel, ModelConfig, load_model, save_model


def make(**changes):
    layers = [{"mixer": "attention", "n_heads": 2, "window": (3, 0), "sinks": True}]
    model = LanguageModel(ModelConfig(**{"vocab_size": 19, "d_model": 8, "layers": layers, "d_mlp": 16, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def folder(tmp_path):
    save_model(make(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_survives(tmp_path, tied, dtype):
    model, tokens = make(tie_embeddings=tied).to(dtype), torch.randint(19, (2, 9))
    save_model(model, tmp_path / "new" / "folder")
    loaded = load_model(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens), model(tokens))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_loading_draws_no_random_numbers(folder):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_model(folder)
    assert torch.equal(torch.rand(3), expected)


def test_every_problem_with_the_tensors_is_listed(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["norm.weight"], tensors["layers.0.mixer.sinks"]
    tensors["head.weight"] = torch.zeros(1)
    tensors["embedding.weight"] = torch.zeros(20, 8)
    save_file(tensors, path)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    message = str(error.value)
    assert "embedding.weight has shape (20, 8) instead of (19, 8)" in message
    assert "missing: layers.0.mixer.sinks, norm.weight" in message
    assert "unexpected: head.weight" in message
    assert "\n" not in message


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file_is_damaged(folder, size):
    path = folder / "model.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        load_model(folder)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        load_model(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model: it has no config\.json"):
        load_model(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object, got list"),
        ('{"d_model": 3}', "needs vocab_size"),
        ("\xff\xfe", "is not JSON"),
    ],
)
def test_a_bad_config_is_named(folder, content, message):
    (folder / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        load_model(folder)


def test_a_failed_write_leaves_what_was_there(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(make(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_full_disk_is_an_os_error(tmp_path, monkeypatch):
    """The writer's own exception is none that a caller would expect."""
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("onchip.models.checkpoint.save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors cannot be written: .*No space left"):
        save_model(make(), tmp_path)


def test_the_config_is_json_for_people(folder):
    assert json.loads((folder / "config.json").read_text())["layers"][0]["mixer"] == "attention"
