"""The optimiser and its schedule."""

from __future__ import annotations

import math

import torch
from torch import nn


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the parameters of `model`; the learning rate is set anew before each step.

    Weights decay only where they are matrices of a linear map: a norm's gain, a bias, a row of an embedding and what a
    mixer names as `undecayed` have a scale of their own to find. β₂ is 0.95 instead of the paper's 0.999: a short run
    forgets its first gradients soon.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (arXiv 1711.05101), Algorithm 2.

    >>> [len(group["params"]) for group in adamw(nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 3)), 0.1).param_groups]
    [1, 2]
    """
    spared = {
        id(module.get_parameter(name))
        for module in model.modules()
        for name in (("weight",) if isinstance(module, nn.Embedding) else getattr(module, "undecayed", ()))
    }
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for parameter in model.parameters():
        (keep if parameter.ndim < 2 or id(parameter) in spared else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, *, peak: float, warmup: int, steps: int) -> float:
    """The learning rate of optimiser step `step` in [0, steps): linear growth to `peak`, then half a cosine to zero.

    Source of the cosine: Loshchilov and Hutter, SGDR (arXiv 1608.03983), equation 5, one period.

    >>> [round(learning_rate(step, peak=1.0, warmup=2, steps=6), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
