"""AdamW against its formula, and the schedule."""

import math

import pytest
import torch
from torch import nn

from onchip.models import LanguageModel
from onchip.nn.mixers import Mamba
from onchip.training import TrainConfig
from onchip.training.optimizer import adamw, learning_rate


def test_it_is_the_papers_algorithm() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(5, 3, bias=False).double()
    optimizer = adamw(linear, weight_decay=0.3)
    w, m, v = linear.weight.detach().clone(), torch.zeros(3, 5), torch.zeros(3, 5)
    for t in range(1, 6):
        lr = 0.1 / t
        g = torch.randn(3, 5, dtype=torch.float64)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w - lr * (m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8) + 0.3 * w)
        linear.weight.grad = g
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    torch.testing.assert_close(linear.weight.detach(), w, rtol=1e-12, atol=1e-12)


def test_only_matrices_of_linear_maps_decay(config: TrainConfig) -> None:
    model = LanguageModel(config.model)
    decay, keep = adamw(model, weight_decay=0.1).param_groups
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = {names[id(parameter)] for parameter in keep["params"]}
    assert kept == {name for name in names.values() if "norm" in name or "embedding" in name}
    assert {names[id(parameter)] for parameter in decay["params"]} == set(names.values()) - kept


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 10), (1, 10), (9, 10), (10, 10), (20, 10)])
def test_the_rate_grows_linearly_then_falls_to_zero(warmup: int, steps: int) -> None:
    rates = [learning_rate(step, peak=2.0, warmup=warmup, steps=steps) for step in range(steps)]
    grown, fallen = rates[:warmup], rates[warmup:]
    assert grown == [2.0 * (step + 1) / warmup for step in range(len(grown))]
    assert fallen == sorted(fallen, reverse=True)
    assert all(0 < rate <= 2.0 for rate in rates)
    if fallen:
        assert fallen[0] == 2.0
        assert math.isclose(fallen[-1] + fallen[min(1, len(fallen) - 1)], 2.0, abs_tol=1e-12) or len(fallen) == 1


def test_what_a_mixer_spares_does_not_decay() -> None:
    mixer = Mamba(4)
    decaying = {id(parameter) for parameter in adamw(mixer, 0.1).param_groups[0]["params"]}
    names = {name for name, parameter in mixer.named_parameters() if id(parameter) in decaying}
    assert names == {"in_proj.weight", "conv.weight", "x_proj.weight", "dt_proj.weight", "out.weight"}
