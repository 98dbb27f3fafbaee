"""A model as a folder: `config.json` and safetensors, onchip's own or as transformers writes them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from onchip._files import atomic_write
from onchip.models.config import ModelConfig
from onchip.models.foreign import Family, read_foreign
from onchip.models.language_model import LanguageModel

_WEIGHTS = "model.safetensors"
_COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def save_model(model: LanguageModel, folder: str | Path, *, like: str | Path | None = None) -> None:
    """Write `model` to `folder`, made where missing: `config.json` and `model.safetensors`.

    With `like`, a folder that transformers wrote, in that folder's format: its config.json is taken over, with its
    tokenizer, and transformers reads the result. Each file is replaced as a whole or not at all.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full; what was there before is still there.
        ValueError: the model is not of the config in `like`.

    >>> import tempfile
    >>> config = ModelConfig(vocab_size=9, d_model=8, layers=[{"mixer": "attention", "n_heads": 2}], d_mlp=16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(LanguageModel(config), folder)
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['config.json', 'model.safetensors']
    """
    folder = Path(folder)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    values, companions = model.config.to_dict(), {}
    if like is not None:
        tensors, values = _as_theirs(model.config, tensors, Path(like))
        companions = {name: (Path(like) / name).read_bytes() for name in _COMPANIONS if (Path(like) / name).is_file()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _WEIGHTS
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from None
    for name, data in companions.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(data)
    with atomic_write(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> LanguageModel:
    """The model in `folder`, on `device`, in the dtype of the file.

    Reads what `save_model` wrote, and checkpoints of transformers (config.json and safetensors, in one file or in
    several with an index) of the families Llama, Mistral, Qwen2, GPT-2, Mamba and Mamba-2. The logits are those of
    transformers without dropout, which is no part of a model here.

    Raises:
        FileNotFoundError: there is no such folder, or one of its files is missing.
        ValueError: a file is truncated or not what its name says, the config asks for what onchip's model has not (the
            field is named), or the tensors do not fit the config; the message lists those that are missing, unexpected,
            of another shape or not of numbers with a fraction.

    >>> import tempfile
    >>> config = ModelConfig(vocab_size=9, d_model=8, layers=[{"mixer": "attention", "n_heads": 2}], d_mlp=16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(LanguageModel(config), folder)
    ...     load_model(folder).num_parameters
    736
    """
    folder = Path(folder)
    family, config = _read_config(folder / "config.json")
    tensors = _read_tensors(folder)
    with torch.device("meta"):
        model = LanguageModel(config)
    expected = dict(model.state_dict())
    if family is not None:
        tensors, expected = family.canonical(tensors, config), family.to_theirs(expected, config)
    if problems := _differences(tensors, expected):
        raise ValueError(f"{folder / _WEIGHTS} does not fit config.json: {'; '.join(problems)}")
    if family is not None:
        tensors = family.to_ours(tensors, config)
    # Copied out of the mapped file, where a tensor begins at any byte: sums over unaligned ones differ in a last bit.
    model.load_state_dict({name: tensor.to(device, copy=True) for name, tensor in tensors.items()}, assign=True)
    return model


def read_config(folder: str | Path) -> ModelConfig:
    """The config of the model in `folder`, which `load_model` would read; raises what it does for its config.

    >>> import tempfile
    >>> config = ModelConfig(vocab_size=9, d_model=8, layers=[{"mixer": "attention", "n_heads": 2}], d_mlp=16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(LanguageModel(config), folder)
    ...     read_config(folder) == config
    True
    """
    return _read_config(Path(folder) / "config.json")[1]


def _as_theirs(config: ModelConfig, tensors: dict[str, Tensor], like: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors in the format of the checkpoint in `like`, and its config.json with their dtype."""
    path = like / "config.json"
    family, described = _read_config(path)
    if family is None:
        raise ValueError(f"{path} is onchip's own: like must be a folder that transformers wrote")
    if described != config:
        ours, theirs = config.to_dict(), described.to_dict()
        names = ", ".join(name for name in ours if ours[name] != theirs[name])
        raise ValueError(f"the model must be of the config in like = {like}, and differs in {names}")
    values = dict(_read_json(path))
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    for name in ("dtype", "torch_dtype"):
        if name in values and len(kinds) == 1:
            (values[name],) = kinds
    return family.to_theirs(tensors, config), values


def _read_config(path: Path) -> tuple[Family | None, ModelConfig]:
    values = _read_json(path)
    try:
        if isinstance(values, Mapping) and "model_type" in values:
            return read_foreign(values)
        return None, ModelConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        if path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent} holds no model: it has no {path.name}") from None
        raise FileNotFoundError(f"there is no folder {path.parent}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the checkpoint: of one file, or of those that its index names."""
    index = folder / f"{_WEIGHTS}.index.json"
    if (folder / _WEIGHTS).exists() or not index.exists():
        return _read_file(folder / _WEIGHTS)
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is no file beside it")
        tensors |= _read_file(folder / name)
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    shapes = [
        f"{name} has shape {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    kinds = [
        f"{name} has dtype {str(found[name].dtype).removeprefix('torch.')} instead of a floating one"
        for name in expected
        if name in found and not found[name].is_floating_point()
    ]
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    return (
        shapes
        + kinds
        + [f"missing: {', '.join(sorted(names))}" for names in [missing] if names]
        + [f"unexpected: {', '.join(sorted(names))}" for names in [unexpected] if names]
    )
