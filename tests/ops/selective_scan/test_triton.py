"""The kernels in Triton against the reference: on a GPU where there is one, else interpreted, at tiny sizes."""

import pytest
import torch

import onchip
from onchip.ops import _triton

from .support import F64, FEATURES, PER_TOKEN, case, run

ON_GPU = torch.cuda.is_available()
ABSENT = _triton.missing or (
    None if ON_GPU or _triton.interpreted_on() else "no GPU, and TRITON_INTERPRET=1 is not set"
)
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
DEVICE = "cuda" if ON_GPU else "cpu"


def assert_near(call, got, exact):
    """Within a few roundings of float32 of the largest value, and one to the dtype."""
    for n, want in exact.items():
        allowed = 32 * torch.finfo(torch.float32).eps * want.abs().max() if want.numel() else 0.0
        error = (got[n].cpu().double() - want).abs()
        assert (error <= allowed + torch.finfo(got[n].dtype).eps * want.abs()).all(), f"{n}: {error.max():.3e}"


def check(call):
    moved = call.replace(**{n: u.to(DEVICE) for n, u in call.arguments.items() if isinstance(u, torch.Tensor)})
    moved = type(call)(moved.arguments, call.grad_out.to(DEVICE), call.grad_state.to(DEVICE))
    assert_near(call, run(moved, "triton"), run(call.to(F64), "reference"))


CASES = {
    "ragged": {"batch": 1, "time": 37, "channels": 3, "groups": 1, "states": 3},
    "one token": {"time": 1, "channels": 4, "states": 2},
    "no tokens": {"batch": 1, "time": 0, "channels": 2, "groups": 1, "states": 2},
    "groups": {"batch": 1, "time": 18, "channels": 4, "groups": 2, "states": 1},
    "packed": {"lengths": [0, 2, 33, 1], "channels": 2, "groups": 1, "states": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    check(case(**CASES[name]).to(torch.float32))


@pytest.mark.parametrize("feature", list(FEATURES)[1:])
def test_features(feature):
    check(case(batch=1, time=5, channels=2, groups=1, states=2, **FEATURES[feature]).to(torch.float32))


def test_sixteen_bits_and_strides():
    call = case(batch=1, time=17, channels=2, groups=1, states=2).to(torch.float16)
    check(call.replace(**{n: call[n].transpose(1, 2).contiguous().transpose(1, 2) for n in PER_TOKEN}))


def test_a_step():
    call = case(time=1, channels=2, groups=1, states=2).to(torch.float32)
    x, dt, B, C, z = (call[n][:, 0].to(DEVICE) for n in PER_TOKEN)
    state, A = call["initial_state"].to(DEVICE), call["A"].to(DEVICE)
    want = onchip.selective_scan_step(x, state, dt, A, B, C, z=z, backend="reference")
    got = onchip.selective_scan_step(x, state, dt, A, B, C, z=z, out_state=state, backend="triton")
    assert got[1] is state
    torch.testing.assert_close(got, want)
