"""What the ops that carry a state along time have in common."""

import pytest
import torch

import onchip
from onchip.ops import _sequence


def scan(A, **options):
    x, B = torch.ones(1, 3, 2), torch.ones(1, 3, 1, 4)
    return onchip.selective_scan(x, x, A[:, None].expand(2, 4), B, B, **options)


def ssd(A, **options):
    x, B = torch.ones(1, 3, 2, 5), torch.ones(1, 3, 1, 4)
    return onchip.ssd(x, x[..., 0], A, B, B, **options)


def conv(A, **options):
    return onchip.causal_conv1d(torch.ones(1, 3, 2), torch.ones(2, 4), A, **options)


@pytest.mark.parametrize("op", [scan, ssd])
def test_a_growing_state_is_warned_of_once(monkeypatch, recwarn, op):
    monkeypatch.setattr(_sequence, "_grown", {"warned": False, "looked on a GPU": False})
    op(torch.tensor([-1.0, 0.0]))
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"A has positive entries, the largest 0\.5") as warned:
        op(torch.tensor([-1.0, 0.5]))
    assert warned[0].filename == __file__
    op(torch.tensor([-1.0, 0.5]))
    assert not recwarn.list


@pytest.mark.parametrize("op", [scan, ssd, conv])
def test_return_final_state_is_a_flag(op):
    with pytest.raises(TypeError, match="return_final_state must be True or False, got 1"):
        op(-torch.ones(2), return_final_state=1)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_state_after_no_tokens_is_another_tensor(backend):
    """A step may then write over it, and not over the one that came in."""
    B, options = torch.ones(1, 0, 1, 4), {"return_final_state": True, "backend": backend}
    x, state = torch.ones(1, 0, 2), torch.ones(1, 2, 4)
    last = onchip.selective_scan(x, x, -torch.ones(2, 4), B, B, initial_state=state, **options).final_state
    assert torch.equal(last, state) and last.data_ptr() != state.data_ptr()
    x, state = torch.ones(1, 0, 2, 5), torch.ones(1, 2, 5, 4)
    last = onchip.ssd(x, x[..., 0], -torch.ones(2), B, B, initial_state=state, **options).final_state
    assert torch.equal(last, state) and last.data_ptr() != state.data_ptr()
    x, state = torch.ones(1, 0, 2), torch.ones(1, 3, 2)
    last = onchip.causal_conv1d(x, torch.ones(2, 4), initial_state=state, **options).final_state
    assert torch.equal(last, state) and last.data_ptr() != state.data_ptr()
