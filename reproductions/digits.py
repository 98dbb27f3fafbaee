"""Sequential digits: scikit-learn's 1,797 images of 8×8, read pixel by pixel, 64 tokens of one feature each.

Not a reproduction by itself, but the task of `lssl.py` and `s4.py`. A model sees one pixel at a time, and what is
classified is the mean of its outputs: without memory it knows how often each shade of grey occurs, and nothing else.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TRAIN = 1437  # four fifths


class Split(NamedTuple):
    """Sequences `(n, 64, 1)` from -1 to 1, and their digits `(n,)`."""

    x: Tensor
    y: Tensor


def load() -> tuple[Split, Split]:
    """The images to train on and those to test on, drawn once and for all."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("the digits are scikit-learn's: pip install 'onchip[reproductions]'") from None
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).reshape(-1, 64, 1) / 8 - 1
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN], order[TRAIN:]
    return Split(x[train], y[train]), Split(x[test], y[test])


class Memoryless(nn.Module):
    """A layer of the same form without a filter: out(gelu(D·x))."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.D, self.out = nn.Parameter(torch.randn(d_model)), nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(F.gelu(self.D * x))
        return y


class Classifier(nn.Module):
    """Residual layers on one feature a token, and a linear classifier on the mean over time."""

    def __init__(self, d_model: int, mixers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, d_model), nn.Linear(d_model, 10)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in mixers)
        self.mixers = nn.ModuleList(mixers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        y: Tensor = self.head(x.mean(dim=1))
        return y


def accuracies(make: Callable[[int], nn.Module], epochs: int, d_model: int, depth: int = 2) -> list[float]:
    """Test accuracy after each epoch. A filter's own parameters learn slowly and do not decay, as published."""
    torch.manual_seed(0)
    train, test = load()
    model = Classifier(d_model, [make(d_model) for _ in range(depth)])
    filters = [p for m in model.mixers for name, p in m.named_parameters() if not name.startswith("out")]
    others = [p for p in model.parameters() if all(p is not q for q in filters)]
    groups = [{"params": filters, "lr": 2e-3, "weight_decay": 0.0}, {"params": others, "lr": 5e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    batches = -(-TRAIN // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [2e-3, 5e-3], epochs * batches)
    found = []
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(TRAIN).chunk(batches):
            loss = F.cross_entropy(model(train.x[rows]), train.y[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            found.append((model.eval()(test.x).argmax(-1) == test.y).float().mean().item())
    return found
