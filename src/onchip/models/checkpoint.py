"""A model as a folder: `config.json` and `model.safetensors`."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from onchip._files import atomic_write
from onchip.models.config import ModelConfig
from onchip.models.language_model import LanguageModel


def save_model(model: LanguageModel, folder: str | Path) -> None:
    """Write `model` to `folder`, made where missing: `config.json` and `model.safetensors`.

    Each file is replaced as a whole or not at all.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full; what was there before is still there.

    >>> import tempfile
    >>> config = ModelConfig(vocab_size=9, d_model=8, layers=[{"mixer": "attention", "n_heads": 2}], d_mlp=16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(LanguageModel(config), folder)
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['config.json', 'model.safetensors']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from None
    with atomic_write(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> LanguageModel:
    """The model that `save_model` wrote to `folder`, on `device`, in the dtype of the file.

    Raises:
        FileNotFoundError: there is no such folder, or one of its files is missing.
        ValueError: a file is truncated or not what its name says, or the tensors do not fit the config; the message
            lists those that are missing, unexpected or of another shape.

    >>> import tempfile
    >>> config = ModelConfig(vocab_size=9, d_model=8, layers=[{"mixer": "attention", "n_heads": 2}], d_mlp=16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(LanguageModel(config), folder)
    ...     load_model(folder).num_parameters
    736
    """
    folder = Path(folder)
    config = _read_config(folder / "config.json")
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    with torch.device("meta"):
        model = LanguageModel(config)
    if problems := _differences(tensors, model.state_dict()):
        raise ValueError(f"{path} does not fit config.json: {'; '.join(problems)}")
    # Copied out of the mapped file, where a tensor begins at any byte: sums over unaligned ones differ in a last bit.
    model.load_state_dict({name: tensor.to(device, copy=True) for name, tensor in tensors.items()}, assign=True)
    return model


def _read_config(path: Path) -> ModelConfig:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        if path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent} holds no model: it has no {path.name}") from None
        raise FileNotFoundError(f"there is no folder {path.parent}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    try:
        return ModelConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    shapes = [
        f"{name} has shape {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    return (
        shapes
        + [f"missing: {', '.join(sorted(names))}" for names in [missing] if names]
        + [f"unexpected: {', '.join(sorted(names))}" for names in [unexpected] if names]
    )
