"""The reference against formulas that are not it: the matrix, and the mathematics of a state."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import onchip

from .support import F64, FEATURES, TENSORS, assert_exact, case, forward


@pytest.mark.parametrize("time", [1, 2, 17])
@pytest.mark.parametrize("feature", FEATURES)
def test_is_its_matrix(time, feature):
    call = case(time=time, **FEATURES[feature]).replace(initial_state=None)
    names = ("dt", "A", "B", "C", "dt_bias", "dt_softplus")
    matrix = onchip.selective_scan_matrix(**{n: v for n, v in call.arguments.items() if n in names})
    assert torch.equal(matrix, matrix.tril())
    y = torch.einsum("bdij,bjd->bid", matrix, call["x"])
    y = y if call["D"] is None else y + call["D"] * call["x"]
    y = y if call["z"] is None else y * F.silu(call["z"])
    assert_exact({"out": forward(call, "reference")["out"]}, {"out": y})


def test_the_matrix_entry_by_entry():
    call = case(batch=1, time=5, channels=4, states=3, groups=2, dt_softplus=False, dt_bias=None)
    dt, A, B, C = (call[n] for n in ("dt", "A", "B", "C"))
    matrix = onchip.selective_scan_matrix(dt, A, B, C)
    for d, i, j in torch.cartesian_prod(torch.arange(4), torch.arange(5), torch.arange(5)).tolist():
        decay = torch.exp(A[d] * dt[0, j + 1 : i + 1, d].sum())
        want = (C[0, i, d // 2] * decay * B[0, j, d // 2]).sum() * dt[0, j, d] if j <= i else torch.tensor(0.0)
        torch.testing.assert_close(matrix[0, d, i, j], want.double())


def test_an_initial_state_is_an_input_before_the_first():
    call = case(time=7, dt_softplus=False, dt_bias=None, D=None, z=None)
    h = call["initial_state"]
    decayed = torch.exp(call["dt"].cumsum(1)[..., None] * call["A"]) * h[:, None]
    through = (call["C"].repeat_interleave(3, 2) * decayed).sum(-1)
    rest = forward(call.replace(initial_state=None), "reference")
    got = forward(call, "reference")
    assert_exact(got, {"out": rest["out"] + through, "final_state": rest["final_state"] + decayed[:, -1]})


@pytest.mark.parametrize("feature", FEATURES)
def test_gradients(feature):
    call = case(batch=1, time=4, channels=4, states=2, **FEATURES[feature])
    names = [n for n in TENSORS if call[n] is not None]

    def scan(*tensors):
        arguments = call.arguments | dict(zip(names, tensors, strict=True))
        return tuple(onchip.selective_scan(**arguments, return_final_state=True, backend="reference"))

    assert gradcheck(scan, [call[n].requires_grad_() for n in names])


def test_low_precision_is_rounded_once():
    call = case(time=30).to(torch.bfloat16)
    got, wide = forward(call, "reference"), forward(call.to(torch.float32), "reference")
    assert got["out"].dtype == torch.bfloat16 and got["final_state"].dtype == torch.float32
    assert torch.equal(got["out"], wide["out"].bfloat16()) and torch.equal(got["final_state"], wide["final_state"])
    assert forward(call.to(F64))["final_state"].dtype == F64
