"""The step form against the parallel form, whose final state it takes up."""

import pytest
import torch
from torch.autograd import gradcheck

import onchip

from .support import ALL_TERMS, F64, randn_case


def step_arguments(call, t):
    """The arguments of the step at time t, without the state."""
    at_t = {f"{name}_t": call[name][:, t] for name in ("x", "dt", "B", "C")}
    rest = {name: call[name] for name in ("A", "D", "dt_bias", "dt_softplus", "dt_limit") if name in call.arguments}
    gate = {} if call["z"] is None else {"z": call["z"][:, t]}
    return at_t | rest | gate


@pytest.mark.parametrize("more", [{}, ALL_TERMS, ALL_TERMS | {"D": "wide"}], ids=["plain", "all", "D per channel"])
@pytest.mark.parametrize("in_place", [False, True])
def test_steps_continue_a_sequence(more, in_place):
    call = randn_case(2, 12, 4, groups=2, **more)
    want, final = onchip.ssd(**call.arguments, return_final_state=True)
    begin = {n: x[:, :5] if n in ("x", "dt", "B", "C", "z") else x for n, x in call.arguments.items()}
    state = onchip.ssd(**begin, return_final_state=True).final_state
    for t in range(5, 12):
        before = state.clone()
        y, new = onchip.ssd_step(state=state, **step_arguments(call, t), out_state=state if in_place else None)
        assert (new is state) == in_place and (in_place or torch.equal(before, state))
        torch.testing.assert_close(y, want[:, t], rtol=1e-10, atol=1e-10)
        state = new
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


def test_gradients():
    call = randn_case(2, 1, 2, 3, 1, 2, **ALL_TERMS)
    settings = {name: call[name] for name in ("dt_softplus", "dt_limit")}
    tensors = {n: x for n, x in step_arguments(call, 0).items() if n not in settings} | {"state": call["initial_state"]}
    function = lambda *x: onchip.ssd_step(**dict(zip(tensors, x, strict=True)), **settings)  # noqa: E731
    assert gradcheck(function, tuple(x.detach().requires_grad_() for x in tensors.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64], ids=str)
def test_dtypes(dtype):
    call = randn_case(2, 1, initial_state=True).to(dtype)
    y, state = onchip.ssd_step(state=call["initial_state"].to(dtype), **step_arguments(call, 0))
    assert y.dtype == dtype and state.dtype == (F64 if dtype == F64 else torch.float32)
