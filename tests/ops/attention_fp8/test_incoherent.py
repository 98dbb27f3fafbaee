"""Signs and Hadamard matrix: q·k stays, an outlier spreads."""

import pytest
import torch

from onchip.ops.attention_fp8 import incoherent


@pytest.mark.parametrize("dim", [1, 2, 5, 16, 96, 128, 256])
def test_products_stay(dim):
    q, k = torch.randn(2, 1, 7, 2, dim)
    turned = [incoherent.rotate(x, seed=3) for x in (q, k)]
    assert turned[0].shape[-1] == 1 << (dim - 1).bit_length()
    got, want = (torch.einsum("bihd,bjhd->bhij", *(x.double() for x in pair)) for pair in (turned, (q, k)))
    # Each coordinate is off by at most log2 of the size roundings of the row's length; so is the product.
    slack = 2 * (dim.bit_length() + 2) * torch.finfo(torch.float32).eps
    assert (got - want).abs().max() <= slack * (q.norm(dim=-1).max() * k.norm(dim=-1).max())


def test_an_outlier_spreads():
    x = torch.zeros(1, 1, 1, 64)
    x[..., 5] = 8.0
    assert torch.equal(incoherent.rotate(x, seed=0).abs(), torch.ones(1, 1, 1, 64))


def test_signs_are_of_the_seed():
    x = torch.randn(1, 3, 2, 16)
    assert torch.equal(incoherent.rotate(x, 1), incoherent.rotate(x, 1))
    assert not torch.equal(incoherent.rotate(x, 1), incoherent.rotate(x, 2))


def test_signs_are_balanced():
    signs = torch.stack([incoherent.signs(seed, 256, torch.device("cpu")) for seed in range(64)])
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert signs.mean().abs() < 5 / signs.numel() ** 0.5  # five standard deviations
