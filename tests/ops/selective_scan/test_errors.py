"""What the selective scan refuses, in which words, and what it warns of."""

import pytest
import torch

import onchip

from .support import case

CALL = case().to(torch.float32)
X, A, B = CALL["x"], CALL["A"], CALL["B"]
WRONG = {
    "x no tensor": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x of integers": ({"x": X.int()}, TypeError, "x must be float64, float32, .* got torch.int32"),
    "x without a batch": ({"x": X[0]}, ValueError, r"x must have shape \(batch, time, channels\), got \(10, 6\)"),
    "dt of another shape": ({"dt": X[:, :9]}, ValueError, r"dt must have shape \(2, 10, 6\), got \(2, 9, 6\)"),
    "no dt": ({"dt": None}, TypeError, "dt must be a tensor, got NoneType"),
    "complex A": ({"A": A * 1j}, TypeError, "A must be float64, .* got torch.complex64"),
    "A of other channels": ({"A": A[:4]}, ValueError, r"A must have shape \(6, d_state\), got \(4, 4\)"),
    "no states": ({"A": A[:, :0]}, ValueError, r"A must have at least one .* got shape \(6, 0\)"),
    "B of other states": (
        {"B": B[..., :3]},
        ValueError,
        r"B must have shape \(2, 10, groups, 4\), got \(2, 10, 2, 3\)",
    ),
    "B without groups": ({"B": B[:, :, 0]}, ValueError, r"B must have shape \(2, 10, groups, 4\), got \(2, 10, 4\)"),
    "C of other groups": ({"C": B[:, :, :1]}, ValueError, r"C must have shape \(2, 10, 2, 4\), got \(2, 10, 1, 4\)"),
    "groups that do not divide": (
        {"B": B.repeat(1, 1, 2, 1)},
        ValueError,
        "B's groups must divide x's 6 channels, got 4 groups",
    ),
    "no groups": ({"B": B[:, :, :0]}, ValueError, "B's groups must divide x's 6 channels, got 0 groups"),
    "D per state": ({"D": A}, ValueError, r"D must have shape \(6,\), got \(6, 4\)"),
    "z of another shape": ({"z": X[:1]}, ValueError, r"z must have shape \(2, 10, 6\), got \(1, 10, 6\)"),
    "dt_bias no tensor": ({"dt_bias": 0.1}, TypeError, "dt_bias must be a tensor, got float"),
    "dt_softplus no boolean": ({"dt_softplus": 1}, TypeError, "dt_softplus must be True or False, got 1"),
    "a state of another shape": (
        {"initial_state": torch.zeros(2, 4, 6)},
        ValueError,
        r"initial_state must have shape \(2, 6, 4\), got \(2, 4, 6\)",
    ),
    "a state of another dtype": (
        {"initial_state": torch.zeros(2, 6, 4, dtype=torch.float64)},
        TypeError,
        "initial_state must be torch.float32 where x is torch.float32, got torch.float64",
    ),
    "tensors elsewhere": ({"D": CALL["D"].to("meta")}, TypeError, "D must be on x's device cpu, got meta"),
    "unknown backend": ({"backend": "cuda"}, ValueError, "backend must be None or one of .* got 'cuda'"),
}
PACKED = case(lengths=[3, 4]).to(torch.float32)
WRONG_PACKED = {
    "a batch": ({"x": X}, ValueError, r"x must have shape \(total, channels\), got \(2, 10, 6\)"),
    "floating": ({"cu_seqlens": torch.tensor([0.0, 7.0])}, TypeError, "cu_seqlens must be an int32 or int64 tensor"),
    "too short": (
        {"cu_seqlens": torch.tensor([0, 3, 6])},
        ValueError,
        "cu_seqlens must run from 0 to .* 7, got 0 to 6",
    ),
    "descending": ({"cu_seqlens": torch.tensor([0, 8, 7])}, ValueError, "cu_seqlens must not descend, got 8 .* by 7"),
    "states": (
        {"cu_seqlens": torch.tensor([0, 3, 4, 7])},
        ValueError,
        r"initial_state must have shape \(3, 6, 4\), got \(2, 6, 4\)",
    ),
}


@pytest.mark.parametrize("more, error, message", WRONG.values(), ids=WRONG)
def test_refuses(more, error, message):
    with pytest.raises(error, match=message):
        onchip.selective_scan(**(CALL.arguments | more))


@pytest.mark.parametrize("more, error, message", WRONG_PACKED.values(), ids=WRONG_PACKED)
def test_refuses_packed(more, error, message):
    with pytest.raises(error, match=message):
        onchip.selective_scan(**(PACKED.arguments | more))


STEP = {
    "x_t": X[:, 0],
    "state": CALL["initial_state"],
    "dt_t": CALL["dt"][:, 0],
    "A": A,
    "B_t": B[:, 0],
    "C_t": CALL["C"][:, 0],
}
WRONG_STEPS = {
    "time": ({"x_t": X}, ValueError, r"x_t must have shape \(batch, channels\), got \(2, 10, 6\)"),
    "state": ({"state": A}, ValueError, r"state must have shape \(2, 6, 4\), got \(6, 4\)"),
    "state's dtype": (
        {"state": STEP["state"].half()},
        TypeError,
        "state must be torch.float32 where x is torch.float32",
    ),
    "B_t": ({"B_t": B}, ValueError, r"B_t must have shape \(2, groups, 4\), got \(2, 10, 2, 4\)"),
    "dt_t": ({"dt_t": X[:1, 0]}, ValueError, r"dt_t must have shape \(2, 6\), got \(1, 6\)"),
    "out_state": ({"out_state": A}, ValueError, r"out_state must have shape \(2, 6, 4\), got \(6, 4\)"),
}


@pytest.mark.parametrize("more, error, message", WRONG_STEPS.values(), ids=WRONG_STEPS)
def test_a_step_refuses(more, error, message):
    with pytest.raises(error, match=message):
        onchip.selective_scan_step(**(STEP | more))
