"""Checkpoints: whole or not there, and the same bits when read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from onchip.models import LanguageModel, load_model
from onchip.training import TrainConfig, Trainer
from onchip.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from onchip.training.optimizer import adamw

Made = tuple[LanguageModel, torch.optim.AdamW]


def make(config: TrainConfig, seed: int) -> Made:
    """A model with an optimiser that has made some steps."""
    torch.manual_seed(seed)
    model = LanguageModel(config.model)
    optimizer = adamw(model, weight_decay=0.1)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return model, optimizer


def bits(made: Made) -> dict[str, bytes]:
    model, optimizer = made
    tensors = dict(model.named_parameters())
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}.{key}": tensor for key, tensor in optimizer.state[parameter].items()}
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


def test_a_checkpoint_returns_every_bit(tmp_path: Path, config: TrainConfig) -> None:
    first, second = make(config, 0), make(config, 1)
    save_checkpoint(tmp_path, 17, *first)
    assert bits(second) != bits(first)
    assert load_checkpoint(tmp_path / "step_00000017", *second) == 17
    assert bits(second) == bits(first)


def test_a_checkpoint_is_a_model_that_can_be_loaded(tmp_path: Path, config: TrainConfig) -> None:
    model, optimizer = make(config, 0)
    save_checkpoint(tmp_path, 1, model, optimizer)
    tokens = torch.randint(257, (1, 9))
    assert load_model(tmp_path / "step_00000001")(tokens).equal(model(tokens))


def test_the_last_two_are_kept_in_the_order_of_their_steps(tmp_path: Path, config: TrainConfig) -> None:
    made = make(config, 0)
    for step in (9, 10, 99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, *made)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_99999999", "step_100000000"]


def test_a_disk_that_fills_at_any_point_leaves_the_checkpoint_before(
    tmp_path: Path, config: TrainConfig, disk_full_at: Callable[[int], None]
) -> None:
    first, second = make(config, 0), make(config, 1)
    save_checkpoint(tmp_path, 1, *first)
    failures = 0
    for point in range(1, 100):
        disk_full_at(point)
        try:
            save_checkpoint(tmp_path, 2, *second)
        except OSError:
            failures += 1
            # The one before; at the last point, where only the folder's entry is not on the disk, the new one too.
            names = sorted(path.name for path in tmp_path.iterdir())
            assert names in (["step_00000001"], ["step_00000001", "step_00000002"])
            expected = first if len(names) == 1 else second
            read = make(config, 2)
            load_checkpoint(checkpoints(tmp_path)[-1], *read)
            assert bits(read) == bits(expected)
        else:
            break
    assert failures >= 4  # the model, its config, the optimiser, the state


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "noise"])
def test_a_damaged_checkpoint_is_refused_by_name_and_says_what_helps(
    tmp_path: Path, config: TrainConfig, name: str, damage: str
) -> None:
    save_checkpoint(tmp_path, 1, *make(config, 0))
    file = tmp_path / "step_00000001" / name
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"\x00\xff" * 40)
    made = make(config, 1)
    with pytest.raises(ValueError, match=r"step_00000001: not a checkpoint .* damaged .* the checkpoint before it"):
        load_checkpoint(tmp_path / "step_00000001", *made)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path, trainer: Callable[..., Trainer]) -> None:
    trainer("run").train()
    other = trainer("other", model=trainer("model").config.model)
    wider = {**other.config.model.to_dict(), "d_model": 32}
    with pytest.raises(ValueError, match="not a checkpoint of this run"):
        trainer("run", model=type(other.config.model).from_dict(wider))


def test_nothing_but_tensors_and_json_is_written(tmp_path: Path, config: TrainConfig) -> None:
    save_checkpoint(tmp_path, 1, *make(config, 0))
    folder = tmp_path / "step_00000001"
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert all(tensor.dtype == torch.float32 for tensor in load_file(folder / "optimizer.safetensors").values())
