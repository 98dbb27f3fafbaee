"""The reference against the recurrence, and the forms of the op against one another, in float64."""

import pytest
import torch
from torch.autograd import gradcheck

import onchip

from .support import ALL_TERMS, F64, assert_exact, differentiate, randn_case, recurrence, run

TERMS = {
    "plain": {},
    "D": {"D": True},
    "D per channel": {"D": "wide"},
    "z": {"z": True},
    "dt": {"dt_bias": True, "dt_softplus": True, "dt_limit": (0.1, 0.9)},
    "state": {"initial_state": True},
    "all": ALL_TERMS,
}


@pytest.mark.parametrize("more", TERMS.values(), ids=TERMS)
def test_reference_is_the_recurrence(more):
    call = randn_case(2, 11, 4, groups=2, chunk_size=4, **more)
    assert_exact(run(call, "reference"), differentiate(call, recurrence))


@pytest.mark.parametrize("time", [0, 1, 63, 130])
def test_lengths(time):
    call = randn_case(2, time, initial_state=True)
    assert_exact(run(call, "reference"), differentiate(call, recurrence))


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 30, 31, 1000])
def test_reference_does_not_depend_on_the_chunks(chunk_size):
    call = randn_case(1, 30, **ALL_TERMS)
    assert_exact(run(call.but(chunk_size=chunk_size), "reference"), run(call, "reference"))


def test_matrix_is_the_op():
    call = randn_case(2, 20, 4, groups=2, dt_bias=True, dt_softplus=True, dt_limit=(0.2, 1.0))
    names = ("dt", "A", "B", "C", "dt_bias", "dt_softplus", "dt_limit")
    matrix = onchip.ssd_matrix(**{name: call[name] for name in names})
    assert matrix.shape == (2, 4, 20, 20) and (matrix.triu(1) == 0).all()
    out = torch.einsum("bhij,bjhp->bihp", matrix, call["x"])
    torch.testing.assert_close(out, onchip.ssd(**call.arguments, backend="reference"), rtol=1e-10, atol=1e-10)


def test_reference_has_whole_gradients():
    call = randn_case(1, 5, 2, 2, 1, 2, chunk_size=3, D=True, z=True, dt_bias=True, initial_state=True)
    names = [name for name, x in call.arguments.items() if isinstance(x, torch.Tensor)]
    function = lambda *x: tuple(  # noqa: E731
        onchip.ssd(**dict(zip(names, x, strict=True)), dt_softplus=True, return_final_state=True, backend="reference")
    )
    assert gradcheck(function, tuple(call[name].requires_grad_() for name in names))


def test_a_scalar_A_is_a_selective_scan_whose_channels_share_it():
    call = randn_case(2, 17, 3, 4, 3, 6, D=True)
    x, dt, A, B, C, D = (call[name] for name in ("x", "dt", "A", "B", "C", "D"))
    state = torch.zeros(2, 3, 4, 6, dtype=F64)
    for t in range(17):  # Mamba's recurrence: A and dt have a value for each channel and each number of its state
        channel_dt, channel_A = dt[:, t, :, None].expand(2, 3, 4), A[:, None, None].expand(3, 4, 6)
        state = torch.exp(channel_dt[..., None] * channel_A) * state
        state = state + channel_dt[..., None] * B[:, t, :, None] * x[:, t, ..., None]
        y = (state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t]
        torch.testing.assert_close(onchip.ssd(**call.arguments, backend="reference")[:, t], y, rtol=1e-10, atol=1e-10)
