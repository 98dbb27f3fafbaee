"""Calls that make no sense: one sentence each, before any kernel runs."""

import pytest
import torch

import onchip

from .support import randn_case


def arguments(**more):
    call = randn_case(2, 6, 4, 5, 2, 7).arguments
    drawn = {
        "D": torch.zeros(4),
        "z": call["x"],
        "dt_bias": torch.zeros(4),
        "initial_state": torch.zeros(2, 4, 5, 7, dtype=torch.float64),
    }
    return call | drawn | more


def zeros(*shape, dtype=torch.float64):
    return torch.zeros(*shape, dtype=dtype)


ERRORS = {
    "x is a list": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x is integer": ({"x": zeros(2, 6, 4, 5, dtype=torch.int32)}, TypeError, "x must be float64, float32"),
    "x has three dimensions": ({"x": zeros(6, 4, 5)}, ValueError, r"x must have 4 dimensions \(batch, time, heads"),
    "no heads": ({"x": zeros(2, 6, 0, 5)}, ValueError, "at least one head"),
    "dt's heads": ({"dt": zeros(2, 6, 3)}, ValueError, r"dt must have shape \(2, 6, 4\), got \(2, 6, 3\)"),
    "A per state": ({"A": zeros(4, 7)}, ValueError, r"A must have shape \(4,\), got \(4, 7\)"),
    "A is an integer": ({"A": zeros(4, dtype=torch.int64)}, TypeError, "A must be float64"),
    "B's time": ({"B": zeros(2, 5, 2, 7)}, ValueError, r"B must have shape \(2, 6, groups, state dim\)"),
    "groups": ({"B": zeros(2, 6, 3, 7)}, ValueError, "B's groups must divide the 4 heads, got 3"),
    "no groups": ({"B": zeros(2, 6, 0, 7)}, ValueError, "B's groups must divide the 4 heads, got 0"),
    "no state": ({"B": zeros(2, 6, 2, 0)}, ValueError, "B's state dim must be at least 1"),
    "B's dtype": ({"B": zeros(2, 6, 2, 7, dtype=torch.float32)}, TypeError, "B must have x's dtype torch.float64"),
    "C's groups": ({"C": zeros(2, 6, 1, 7)}, ValueError, r"C must have shape \(2, 6, 2, 7\)"),
    "C's device": ({"C": zeros(2, 6, 2, 7).to("meta")}, TypeError, "C must be on x's device cpu, got meta"),
    "D's heads": ({"D": zeros(5)}, ValueError, r"D must have shape \(4,\), got \(5,\)"),
    "D's channels": ({"D": zeros(4, 4)}, ValueError, r"D must have shape \(4, 5\), got \(4, 4\)"),
    "D is a number": ({"D": 1.0}, TypeError, "D must be a tensor, got float"),
    "z's shape": ({"z": zeros(2, 6, 4, 4)}, ValueError, r"z must have shape \(2, 6, 4, 5\)"),
    "dt_bias's shape": ({"dt_bias": zeros(1)}, ValueError, r"dt_bias must have shape \(4,\), got \(1,\)"),
    "dt_softplus is a number": ({"dt_softplus": 1}, TypeError, "dt_softplus must be True or False, got 1"),
    "dt_limit reversed": ({"dt_limit": (1.0, 0.5)}, ValueError, r"low at most high, got \(1.0, 0.5\)"),
    "dt_limit is NaN": ({"dt_limit": (0.0, float("nan"))}, ValueError, "low at most high"),
    "dt_limit is a number": ({"dt_limit": 1.0}, ValueError, r"dt_limit must be a pair \(low, high\)"),
    "dt_limit of None": ({"dt_limit": (0.0, None)}, TypeError, r"dt_limit must be a pair \(low, high\)"),
    "chunk_size 0": ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    "chunk_size is a float": ({"chunk_size": 64.0}, TypeError, "chunk_size must be an integer or None, got float"),
    "state's shape": (
        {"initial_state": zeros(2, 4, 7, 5)},
        ValueError,
        r"initial_state must have shape \(2, 4, 5, 7\)",
    ),
    "state's dtype": (
        {"initial_state": zeros(2, 4, 5, 7, dtype=torch.float16)},
        TypeError,
        "initial_state must be torch.float64 or of x's dtype torch.float64, got torch.float16",
    ),
    "return_final_state": ({"return_final_state": 1}, TypeError, "return_final_state must be True or False"),
    "boundaries of a batch": ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "as cu_seqlens is given"),
    "backend": ({"backend": "cuda"}, ValueError, "ssd: backend must be None or one of"),
}


@pytest.mark.parametrize("wrong, error, message", ERRORS.values(), ids=ERRORS)
def test_ssd(wrong, error, message):
    with pytest.raises(error, match=message):
        onchip.ssd(**arguments(**wrong))


BOUNDARIES = {
    "floating": (torch.tensor([0.0, 6.0]), TypeError, "cu_seqlens must be an int32 or int64 tensor"),
    "too short": (torch.tensor([0, 5]), ValueError, "cu_seqlens must run from 0 to the number of rows 6, got 0 to 5"),
    "descending": (torch.tensor([0, 4, 2, 6]), ValueError, "cu_seqlens must not descend"),
    "two dimensions": (torch.tensor([[0, 6]]), ValueError, "cu_seqlens must have shape"),
}


@pytest.mark.parametrize("cu_seqlens, error, message", BOUNDARIES.values(), ids=BOUNDARIES)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_boundaries(cu_seqlens, error, message, backend):
    call = randn_case(1, 6, cu_seqlens=[0, 6]).but(cu_seqlens=cu_seqlens, backend=backend)
    with pytest.raises(error, match=message):
        onchip.ssd(**call.arguments)


def test_states_of_packed_sequences():
    call = randn_case(1, 6, cu_seqlens=[0, 2, 6], initial_state=True)
    with pytest.raises(ValueError, match=r"initial_state must have shape \(2, 2, 5, 7\), got \(1, 2, 5, 7\)"):
        onchip.ssd(**call.but(initial_state=call["initial_state"][:1]).arguments)


def step_arguments(**more):
    shapes = {"x_t": (2, 4, 5), "state": (2, 4, 5, 7), "dt_t": (2, 4), "A": (4,), "B_t": (2, 2, 7), "C_t": (2, 2, 7)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()} | more


STEP_ERRORS = {
    "time": ({"x_t": torch.zeros(2, 1, 4, 5)}, ValueError, r"x_t must have 3 dimensions \(batch, heads, head dim\)"),
    "dt_t": ({"dt_t": torch.zeros(2, 3)}, ValueError, r"dt_t must have shape \(2, 4\)"),
    "B_t": ({"B_t": torch.zeros(2, 3, 7)}, ValueError, "B_t's groups must divide the 4 heads, got 3"),
    "C_t": ({"C_t": torch.zeros(2, 2, 6)}, ValueError, r"C_t must have shape \(2, 2, 7\)"),
    "state": ({"state": torch.zeros(2, 4, 7, 5)}, ValueError, r"state must have shape \(2, 4, 5, 7\)"),
    "state's dtype": ({"state": torch.zeros(2, 4, 5, 7).half()}, TypeError, "state must be torch.float32 or of x's"),
    "out_state's shape": ({"out_state": torch.zeros(1, 4, 5, 7)}, ValueError, "out_state must have shape"),
    "out_state's dtype": ({"out_state": torch.zeros(2, 4, 5, 7).half()}, TypeError, "out_state must be torch.float32"),
    "dt_limit reversed": ({"dt_limit": (1, 0)}, ValueError, "low at most high"),
}


@pytest.mark.parametrize("wrong, error, message", STEP_ERRORS.values(), ids=STEP_ERRORS)
def test_step(wrong, error, message):
    with pytest.raises(error, match=message):
        onchip.ssd_step(**step_arguments(**wrong))


MATRIX_ERRORS = {
    "dt": ({"dt": torch.zeros(6, 4)}, ValueError, r"dt must have shape \(batch, time, heads\), got \(6, 4\)"),
    "B": ({"B": torch.zeros(2, 6, 3, 7)}, ValueError, "B's groups must divide the 4 heads, got 3"),
    "C": ({"C": torch.zeros(2, 6, 2, 7, dtype=torch.float16)}, TypeError, "C must have"),
    "dt_limit reversed": ({"dt_limit": (1, 0)}, ValueError, "low at most high"),
}


@pytest.mark.parametrize("wrong, error, message", MATRIX_ERRORS.values(), ids=MATRIX_ERRORS)
def test_matrix(wrong, error, message):
    right = {
        "dt": torch.zeros(2, 6, 4),
        "A": torch.zeros(4),
        "B": torch.zeros(2, 6, 2, 7),
        "C": torch.zeros(2, 6, 2, 7),
    }
    with pytest.raises(error, match=message):
        onchip.ssd_matrix(**(right | wrong))
