"""The state of a run on disk: written whole or not at all, never half."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from onchip._files import atomic_write, sync_folder
from onchip.models import LanguageModel, load_model, save_model

KEPT = 2
_OPTIMIZER, _STATE = "optimizer.safetensors", "state.json"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON for people to read, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_checkpoint(folder: Path, step: int, model: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
    """Write the checkpoint of `step` into `folder`, then remove all but the last two.

    A checkpoint is a folder: the model as `save_model` writes it, so that it can be loaded and sampled from, and the
    optimiser's tensors. It appears under its name once all of it is on the disk. Raises `OSError` where it cannot be
    written; the checkpoints before it are then untouched.
    """
    final = folder / f"step_{step:08}"
    if final.exists():
        return
    temporary = folder / f".{final.name}.new"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_model(model, temporary)
        with atomic_write(temporary / _OPTIMIZER) as file:
            file.write_bytes(save(_optimizer_tensors(model, optimizer)))
        write_json(temporary / _STATE, {"step": step})
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder)
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = (path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name))
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def load_checkpoint(checkpoint: Path, model: LanguageModel, optimizer: torch.optim.Optimizer) -> int:
    """Put the weights and the optimiser's state of `checkpoint` into `model` and `optimizer`; returns the step.

    Raises `ValueError` where the checkpoint is damaged or of another model.
    """
    try:
        step = int(json.loads((checkpoint / _STATE).read_text())["step"])
        weights = load_model(checkpoint)
        tensors = load_file(checkpoint / _OPTIMIZER)
        model.load_state_dict(weights.state_dict())
        _set_optimizer_tensors(model, optimizer, tensors)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{checkpoint}: not a checkpoint of this run, or damaged ({reason}); "
            "without that folder the run goes on from the checkpoint before it"
        ) from error
    return step


def _optimizer_tensors(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state[parameter].items()
    }


def _set_optimizer_tensors(model: LanguageModel, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        state = {key: tensors[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        if any(tensor.ndim and tensor.shape != parameter.shape for tensor in state.values()):
            raise ValueError(f"{_OPTIMIZER} has another shape for {name}")
        # A copy, because the file's memory is aligned otherwise, and a sum over it may then round otherwise.
        optimizer.state[parameter] = {key: tensor.clone().to(parameter.device) for key, tensor in state.items()}
