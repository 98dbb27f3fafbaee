import math

import pytest
import torch

from onchip.generation import Sampling

PROBABILITIES = [0.05, 0.4, 0.02, 0.3, 0.2, 0.03]
LOGITS = torch.tensor(PROBABILITIES).log()


def draws(rule, n=4000):
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    return rule.draw(LOGITS.expand(n, -1), generators)


def frequencies_fit(tokens, probabilities):
    """Whether every count lies within five standard deviations."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    p, n = p / p.sum(), len(tokens)
    counts = torch.bincount(tokens, minlength=len(p)).double()
    return bool(((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt()).all())


@pytest.mark.parametrize(
    ("rule", "probabilities"),
    [
        (Sampling(), PROBABILITIES),
        (Sampling(temperature=0.5), [p**2 for p in PROBABILITIES]),
        (Sampling(temperature=2.0), [p**0.5 for p in PROBABILITIES]),
        (Sampling(top_k=2), [0, 0.4, 0, 0.3, 0, 0]),
        (Sampling(top_k=99), PROBABILITIES),
        (Sampling(top_p=0.71), [0, 0.4, 0, 0.3, 0.2, 0]),
        (Sampling(top_p=0.69), [0, 0.4, 0, 0.3, 0, 0]),
        (Sampling(top_p=1e-9), [0, 1, 0, 0, 0, 0]),
        (Sampling(min_p=0.1), [0.05, 0.4, 0, 0.3, 0.2, 0]),
        (Sampling(min_p=1.0), [0, 1, 0, 0, 0, 0]),
        (Sampling(top_k=4, top_p=0.97, min_p=0.4), [0, 0.4, 0, 0.3, 0.2, 0]),
        (Sampling(temperature=0.0), [0, 1, 0, 0, 0, 0]),
        (Sampling(temperature=1e-300), [0, 1, 0, 0, 0, 0]),
    ],
)
def test_frequencies(rule, probabilities):
    assert frequencies_fit(draws(rule), probabilities)


def test_the_check_on_frequencies_can_fail():
    assert not frequencies_fit(draws(Sampling()), [p**1.3 for p in PROBABILITIES])


def test_a_hidden_token_is_never_drawn():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf]]).expand(500, -1)
    assert (Sampling().draw(logits, [torch.Generator().manual_seed(i) for i in range(500)]) == 1).all()


def test_a_row_does_not_depend_on_the_others():
    logits = torch.randn(5, 50)
    together = Sampling(top_p=0.9).draw(logits, [torch.Generator().manual_seed(i) for i in range(5)])
    for i in range(5):
        alone = Sampling(top_p=0.9).draw(logits[i : i + 1], [torch.Generator().manual_seed(i)])
        assert alone.item() == together[i]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temperature": -0.1}, ValueError, "temperature must be finite and not negative, got -0.1"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"temperature": math.inf}, ValueError, "temperature"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 2.5}, TypeError, "top_k must be an integer"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        ({"min_p": -0.5}, ValueError, r"min_p must be in \[0, 1\], got -0.5"),
        ({"min_p": 1.1}, ValueError, "min_p"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Sampling(**arguments)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_an_error(temperature):
    with pytest.raises(RuntimeError, match="NaN"):
        Sampling(temperature).draw(torch.tensor([[0.0, math.nan]]), [torch.Generator()])
