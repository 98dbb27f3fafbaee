"""Synthetic tasks of sequence models, and the loop that trains small language models on them.

Not a reproduction by itself, but the tasks of `mamba.py` and `mamba2.py`. Every batch is drawn anew, so that nothing
can be learned by heart, and only some tokens are asked for: what is right elsewhere is not defined.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from onchip.models import LanguageModel, ModelConfig
from onchip.training.optimizer import adamw, learning_rate

NOT_ASKED = -100  # what cross-entropy leaves out
EVERY = 50  # steps between two looks at what is right


class Batch(NamedTuple):
    """Tokens `(B, T)`, and what is to be answered at each of them: a token, or `NOT_ASKED`."""

    tokens: Tensor
    targets: Tensor


Task = Callable[[int], Batch]
"""Draws a batch of so many sequences."""


class Point(NamedTuple):
    """What part of the answers is right after a step of training."""

    step: int
    accuracy: float


def power_of_two(least: int, most: int) -> int:
    """One of those from `least` to `most`, both powers of two themselves."""
    return 1 << int(torch.randint(least.bit_length() - 1, most.bit_length(), ()))


def selective_copying(batch: int, length: int, n_tokens: int, vocab_size: int) -> Batch:
    """`n_tokens` tokens strewn over `length` blanks, then as many markers, at which they are asked for in order.

    Token 0 is the blank, 1 the marker. How far apart the tokens lie is another in each sequence.
    """
    values = torch.randint(2, vocab_size, (batch, n_tokens))
    places = torch.rand(batch, length).topk(n_tokens).indices.sort().values
    tokens = torch.zeros(batch, length, dtype=torch.int64).scatter_(1, places, values)
    return Batch(
        torch.cat([tokens, torch.ones_like(values)], dim=1),
        torch.cat([torch.full_like(tokens, NOT_ASKED), values], dim=1),
    )


def induction_heads(batch: int, length: int, vocab_size: int) -> Batch:
    """Random tokens, among them once the special one, token 0, which also is the last: what followed it before?"""
    tokens = torch.randint(1, vocab_size, (batch, length))
    places = torch.randint(length - 2, (batch, 1))
    tokens.scatter_(1, places, 0)
    tokens[:, -1] = 0
    targets = torch.full_like(tokens, NOT_ASKED)
    targets[:, -1:] = tokens.gather(1, places + 1)
    return Batch(tokens, targets)


def associative_recall(batch: int, length: int, n_pairs: int, vocab_size: int) -> Batch:
    """`n_pairs` keys, each with its value after it; then random tokens, among them each key once, asked for its value.

    Keys are the tokens of the first half of the vocabulary, each at most once in the pairs, and values those of the
    second, from which the random tokens are too.
    """
    half = vocab_size // 2
    keys = torch.rand(batch, half).topk(n_pairs).indices
    values = torch.randint(half, vocab_size, (batch, n_pairs))
    pairs = torch.stack([keys, values], dim=-1).flatten(1)
    tokens = torch.randint(half, vocab_size, (batch, length - 2 * n_pairs))
    places = torch.rand(tokens.shape).topk(n_pairs).indices
    targets = torch.full_like(tokens, NOT_ASKED).scatter_(1, places, values)
    return Batch(
        torch.cat([pairs, tokens.scatter_(1, places, keys)], dim=1),
        torch.cat([torch.full_like(pairs, NOT_ASKED), targets], dim=1),
    )


def language_model(
    mixer: Mapping[str, Any], *, vocab_size: int, d_model: int, d_mlp: int | None = None, depth: int = 2
) -> LanguageModel:
    """A model with these mixers; its MLPs are as wide as the residual stream unless `d_mlp` is given."""
    torch.manual_seed(0)
    layers = [mixer] * depth
    return LanguageModel(ModelConfig(vocab_size=vocab_size, d_model=d_model, layers=layers, d_mlp=d_mlp or d_model))


def train(
    model: LanguageModel, task: Task, test: Batch, *, steps: int, lr: float, weight_decay: float = 0.1, batch: int = 32
) -> list[Point]:
    """Train as `onchip train` does: AdamW, a linear warm-up over a tenth of the steps, half a cosine, clipping."""
    torch.manual_seed(1)
    optimizer = adamw(model, weight_decay)
    points = []
    for step in range(steps):
        tokens, targets = task(batch)
        asked = targets != NOT_ASKED
        torch.autograd.backward(F.cross_entropy(model(tokens)[asked], targets[asked]))
        clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=lr, warmup=steps // 10, steps=steps)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            points.append(Point(step + 1, accuracy(model, test)))
    return points


@torch.no_grad()
def accuracy(model: LanguageModel, test: Batch) -> float:
    """The part of the answers that are right."""
    asked = test.targets != NOT_ASKED
    right: float = (model(test.tokens)[asked].argmax(-1) == test.targets[asked]).float().mean().item()
    return right
