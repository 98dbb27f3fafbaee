"""The Triton kernels, interpreted where there is no GPU, at twice the error of eager PyTorch."""

import pytest
import torch

import onchip
from onchip.ops import _triton

from .support import ALL_TERMS, assert_twice_eager, lay_out, randn_case
from .test_step import step_arguments

ON_GPU = torch.cuda.is_available()
ABSENT = _triton.missing or (
    None if ON_GPU or _triton.interpreted_on() else "there is no GPU, and TRITON_INTERPRET=1 is not set"
)
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
# Interpreted, products in bfloat16 are wrong.
LOW = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float16,)

CASES = {
    "plain": ((1, 20, 2, 8, 1, 8), {"chunk_size": 16}),
    "all": ((2, 37, 2, 5, 1, 7), ALL_TERMS | {"chunk_size": 16}),
    "groups, two blocks of the state": ((1, 18, 4, 6, 2, 70), {"chunk_size": 16, "D": "wide"}),
    "its own chunks": ((1, 65, 1, 3, 1, 4), {"initial_state": True}),
    "one step": ((1, 1, 2, 3, 1, 4), ALL_TERMS),
    "no time": ((1, 0, 2, 3, 1, 4), ALL_TERMS),
    "packed": ((1, 40, 2, 5, 1, 7), ALL_TERMS | {"chunk_size": 16, "cu_seqlens": [0, 3, 3, 22, 40]}),
    "strong decay": ((1, 40, 2, 4, 1, 4), {"chunk_size": 16, "rate": 100.0}),
}


@pytest.mark.parametrize("shape, more", CASES.values(), ids=CASES)
def test_twice_eagers_error(shape, more):
    assert_twice_eager(randn_case(*shape, **more).to(torch.float32), "triton")


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", ["all", "packed"])
def test_16_bits_at_twice_eagers_error(name, dtype):
    shape, more = CASES[name]
    assert_twice_eager(randn_case(*shape, **more).to(dtype), "triton")


@pytest.mark.parametrize("how", ["last outermost", "every other"])
def test_strides(how):
    call = randn_case(2, 18, 2, 3, 1, 4, **ALL_TERMS, chunk_size=16).to(torch.float32)
    laid = {name: lay_out(x, how) for name, x in call.arguments.items() if isinstance(x, torch.Tensor)}
    assert_twice_eager(call.but(**laid), "triton")


@pytest.mark.parametrize("more", [{}, ALL_TERMS | {"D": "wide"}], ids=["plain", "all"])
@pytest.mark.parametrize("in_place", [False, True])
def test_step(in_place, more):
    device = "cuda" if ON_GPU else "cpu"
    call = randn_case(2, 1, 4, 9, 2, 17, **({"initial_state": True} | more)).to(torch.float32)
    move = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x  # noqa: E731
    arguments = {name: move(x) for name, x in step_arguments(call, 0).items()}
    state = move(call["initial_state"])
    want = onchip.ssd_step(state=state, **arguments, backend="reference")
    got = onchip.ssd_step(state=state, **arguments, out_state=state if in_place else None, backend="triton")
    torch.testing.assert_close(got, want)


def test_limits():
    call = randn_case(1, 2, 1, 129)
    with pytest.raises(ValueError, match="the head dim goes to 128, got 129"):
        onchip.ssd(**call.to(torch.float32).arguments, backend="triton")
    with pytest.raises(ValueError, match="the call is in float64"):
        onchip.ssd(**randn_case(1, 2).arguments, backend="triton")
