"""Every implementation of the causal convolution against an independent formula, and against its other forms."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv1d, silu

import onchip

from .conftest import Target

F64 = torch.float64


def eager(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, active: bool) -> Tensor:
    """The convolution as one writes it in PyTorch, in x's dtype."""
    before = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2]) if state is None else state
    inputs = torch.cat([before, x], 1).transpose(1, 2)
    if x.shape[1] == 0:
        return torch.zeros_like(x)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = conv1d(inputs, weight[:, None], bias, groups=len(weight)).transpose(1, 2)
    return silu(y) if active else y


def assert_twice_eager(
    got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, active: bool
) -> None:
    """An error of at most twice that of eager PyTorch, plus a rounding to x's dtype and a few of the arithmetic's."""
    tensors = [None if t is None else t.to(F64) for t in (x, weight, bias, state)]
    want = eager(*tensors, active)
    terms = eager(*[None if t is None else t.abs() for t in tensors], False)
    error, eagers = (got.to(F64) - want).abs(), (eager(x, weight, bias, state, active).to(F64) - want).abs()
    arithmetic = F64 if x.dtype == F64 else torch.float32
    slack = torch.finfo(x.dtype).eps * want.abs() + 4 * torch.finfo(arithmetic).eps * terms
    assert got.shape == want.shape and got.dtype == x.dtype
    if want.numel():
        excess = (error - 2 * eagers.max() - slack).max()
        assert excess <= 0, f"error {error.max():.3e}, eager's {eagers.max():.3e}, {excess:.3e} too much"


def inputs(batch: int, length: int, channels: int, width: int, dtype: torch.dtype = F64) -> tuple[Tensor, ...]:
    """x, weight, bias and an initial state."""
    return (
        torch.randn(batch, length, channels).to(dtype),
        torch.randn(channels, width).to(dtype) / width**0.5,
        torch.randn(channels).to(dtype),
        torch.randn(batch, width - 1, channels).to(dtype),
    )


SIZES = [
    (2, 9, 5, 4),
    (1, 1, 3, 4),
    (3, 2, 7, 4),
    (2, 5, 4, 1),
    (2, 40, 33, 3),
    (1, 33, 17, 2),
    (2, 21, 3, 9),
    (1, 3, 2, 7),
]


@pytest.mark.parametrize("active", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(target: Target, size, active):
    for dtype in target.dtypes:
        x, weight, bias, state = inputs(*size, dtype)
        activation = "silu" if active else None
        assert_twice_eager(target.conv(x, weight, activation=activation), x, weight, None, None, active)
        y, final = target.conv(x, weight, bias, activation=activation, initial_state=state, return_final_state=True)
        assert_twice_eager(y, x, weight, bias, state, active)
        assert torch.equal(final, torch.cat([state, x], 1)[:, x.shape[1] :])


def test_what_is_empty(target: Target):
    for batch, length, channels in [(0, 5, 3), (2, 0, 3), (2, 5, 0)]:
        x, weight, bias, state = inputs(batch, length, channels, 4, torch.float32)
        y, final = target.conv(x, weight, bias, initial_state=state, return_final_state=True)
        assert y.shape == x.shape and final.shape == state.shape
        assert torch.equal(final, torch.cat([state, x], 1)[:, length:])


def test_the_matrix(target: Target):
    x, weight, _, _ = inputs(2, 7, 3, 4, target.dtypes[0])
    matrix = onchip.causal_conv1d_matrix(weight, 7)
    assert matrix.shape == (3, 7, 7)
    torch.testing.assert_close(torch.einsum("dts,bsd->btd", matrix, x), target.conv(x, weight))
    assert torch.equal(onchip.causal_conv1d_matrix(weight, 2), matrix[:, :2, :2])


@given(data=st.data())
@settings(max_examples=20)
def test_a_split_at_any_point_is_one_pass(quick_target: Target, data):
    length, width = data.draw(st.integers(0, 24)), data.draw(st.integers(1, 6))
    x, weight, bias, state = inputs(2, length, 3, width, quick_target.dtypes[0])
    options = {"activation": "silu", "return_final_state": True}
    whole, last = quick_target.conv(x, weight, bias, initial_state=state, **options)
    parts = []
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=3)))
    for a, b in pairwise([0, *cuts, length]):
        part, state = quick_target.conv(x[:, a:b], weight, bias, initial_state=state, **options)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(state, last)


def test_steps_are_one_pass(target: Target):
    for dtype in target.dtypes:
        x, weight, bias, state = inputs(3, 6, 5, 4, dtype)
        options = {"activation": "silu"}
        want, last = onchip.causal_conv1d(
            x, weight, bias, initial_state=state, return_final_state=True, backend="reference", **options
        )
        pure, place = state, state.clone()
        for t in range(6):
            y_t, pure = target.step(x[:, t], pure, weight, bias, **options)
            again, place = target.step(x[:, t], place, weight, bias, out_state=place, **options)
            torch.testing.assert_close(y_t, want[:, t])
            assert torch.equal(again, y_t)
        assert torch.equal(pure, last)
        assert torch.equal(place, last)


def test_a_step_writes_where_it_is_told():
    x, weight, _, state = inputs(2, 1, 5, 3, torch.float32)
    before, other = state.clone(), torch.full((3, 5, 2), torch.nan).movedim(-1, 1)[:2]
    y, new = onchip.causal_conv1d_step(x[:, 0], state, weight)
    assert torch.equal(state, before)
    y_other, written = onchip.causal_conv1d_step(x[:, 0], state, weight, out_state=other)
    assert written is other and torch.equal(state, before)
    y_place, place = onchip.causal_conv1d_step(x[:, 0], state, weight, out_state=state)
    assert place is state
    for got in (other, state):
        assert torch.equal(got, new)
    assert torch.equal(y_other, y) and torch.equal(y_place, y)


@given(data=st.data())
@settings(max_examples=20)
def test_packed_is_one_by_one(quick_target: Target, data):
    lengths = data.draw(st.lists(st.integers(0, 9), max_size=6))
    width, channels = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 20))
    x, weight, bias, _ = inputs(1, sum(lengths), channels, width, quick_target.dtypes[0])
    state = torch.randn(len(lengths), width - 1, channels, dtype=x.dtype)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    options = {"activation": "silu", "return_final_state": True}
    y, final = quick_target.conv(x[0], weight, bias, initial_state=state, cu_seqlens=cu.int(), **options)
    assert final.shape == state.shape
    for i, (a, b) in enumerate(pairwise(cu.tolist())):
        want, last = quick_target.conv(x[:, a:b], weight, bias, initial_state=state[i, None], **options)
        torch.testing.assert_close(y[a:b], want[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(final[i], last[0])


def test_a_split_is_one_pass(target: Target):
    x, weight, bias, state = inputs(2, 7, 3, 4, target.dtypes[0])
    whole, last = target.conv(x, weight, bias, initial_state=state, return_final_state=True)
    first, between = target.conv(x[:, :2], weight, bias, initial_state=state, return_final_state=True)
    second, end = target.conv(x[:, 2:], weight, bias, initial_state=between, return_final_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(end, last)


def test_packed_without_a_state(target: Target):
    x, weight, bias, _ = inputs(1, 12, 3, 4, target.dtypes[0])
    y, final = target.conv(x[0], weight, bias, cu_seqlens=torch.tensor([0, 2, 2, 12]), return_final_state=True)
    torch.testing.assert_close(y[2:], target.conv(x[:, 2:], weight, bias)[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(final[:, :, 0], torch.stack([torch.tensor([0, *x[0, :2, 0]]), torch.zeros(3), x[0, 9:, 0]]))


def inside(x: Tensor, larger, part: slice) -> Tensor:
    """`x` as a part of a tensor that is NaN elsewhere."""
    storage = torch.full([larger(n) for n in x.shape], torch.nan, dtype=x.dtype)
    return storage[(part,) * x.ndim].copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "time contiguous": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "batch contiguous": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "inside a larger tensor": lambda x: inside(x, lambda n: n + 3, slice(1, -2)),
    "inside, time contiguous": lambda x: inside(x.transpose(-1, -2), lambda n: n + 3, slice(2, -1)).transpose(-1, -2),
    "every other": lambda x: inside(x, lambda n: 2 * n, slice(None, None, 2)),
    "one step for all": lambda x: x[..., :1, :].expand(x.shape),
    "one channel for all": lambda x: x[..., :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(2, 37, 19, 4), (2, 3, 1, 2), (1, 50, 3, 5)], ids=str)
def test_strides(target: Target, size, layout):
    x, weight, bias, state = inputs(*size, target.dtypes[-1])
    x, state = LAYOUTS[layout](x), LAYOUTS[layout](state)
    weight, bias = weight.t().contiguous().t(), torch.stack([bias, bias], 1)[:, 0]
    y = target.conv(x, weight, bias, initial_state=state)
    assert_twice_eager(y, x, weight, bias, state, False)
    packed = target.conv(x[0], weight, bias, initial_state=state[:1], cu_seqlens=torch.tensor([0, size[1]]))
    assert torch.equal(packed, y[0])


def test_weights_of_another_dtype(target: Target):
    for dtype in target.dtypes:
        x, weight, bias, _ = inputs(2, 9, 5, 4, dtype)
        want = target.conv(x, weight, bias)
        for other in (torch.float32, F64):
            if torch.finfo(other).eps <= torch.finfo(dtype).eps:
                assert torch.equal(target.conv(x, weight.to(other), bias.to(other)), want)


def test_nan_reaches_what_sees_it_and_nothing_else(target: Target):
    x, weight, bias, _ = inputs(2, 20, 3, 4, torch.float32)
    x[1, 7, 2] = torch.nan
    seen = target.conv(x, weight, bias, activation="silu").isnan().nonzero().tolist()
    assert seen == [[1, t, 2] for t in range(7, 11)]


def test_large_values_do_not_overflow_in_the_activation(target: Target):
    x = torch.tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 1e4]).reshape(1, 6, 1)
    y = target.conv(x, torch.ones(1, 1), activation="silu")
    torch.testing.assert_close(y, silu(x.double()).float(), rtol=1e-5, atol=1e-30)


X, WEIGHT, STATE = torch.randn(2, 5, 3), torch.randn(3, 4), torch.randn(2, 3, 3)
CU = torch.tensor([0, 2, 5])
WRONG = {
    "not a tensor": (([1.0], WEIGHT), {}, TypeError, "x must be a tensor, got list"),
    "integers": ((X.int(), WEIGHT), {}, TypeError, "x must be float64, .* got torch.int32"),
    "no batch": ((X[0], WEIGHT), {}, ValueError, r"x must have shape \(B, T, D\), got \(5, 3\)"),
    "no packed rows": ((X, WEIGHT), {"cu_seqlens": CU}, ValueError, r"x must have shape \(total, D\), got \(2, 5, 3\)"),
    "no filter": ((X, None), {}, TypeError, "weight must be a tensor, got NoneType"),
    "no taps": ((X, WEIGHT[:, :0]), {}, ValueError, r"weight must have at least one tap, got shape \(3, 0\)"),
    "other channels": ((X, WEIGHT[:2]), {}, ValueError, r"weight must have shape \(3, W\), got \(2, 4\)"),
    "nn.Conv1d's": ((X, WEIGHT[:, None]), {}, ValueError, r"weight must have shape \(3, W\), got \(3, 1, 4\)"),
    "weight elsewhere": ((X, WEIGHT.to("meta")), {}, TypeError, "weight must be on x's device cpu, got meta"),
    "integer weight": ((X, WEIGHT.int()), {}, TypeError, "weight must be float64, .* got torch.int32"),
    "another bias": ((X, WEIGHT, X[0]), {}, ValueError, r"bias must have shape \(3,\), got \(5, 3\)"),
    "an activation": (
        (X, WEIGHT),
        {"activation": "gelu"},
        ValueError,
        "activation must be None, 'silu' or 'swish', got",
    ),
    "state's dtype": (
        (X, WEIGHT),
        {"initial_state": STATE.double()},
        TypeError,
        "initial_state must have x's dtype torch.float32, got torch.float64",
    ),
    "state's width": (
        (X, WEIGHT),
        {"initial_state": torch.randn(2, 4, 3)},
        ValueError,
        r"initial_state must have shape \(2, 3, 3\), got \(2, 4, 3\)",
    ),
    "states of sequences": (
        (X[0], WEIGHT),
        {"initial_state": STATE[:1], "cu_seqlens": CU},
        ValueError,
        r"initial_state must have shape \(2, 3, 3\), got \(1, 3, 3\)",
    ),
    "boundaries in float": ((X[0], WEIGHT), {"cu_seqlens": CU.float()}, TypeError, "cu_seqlens must be an int32 or"),
    "boundaries in two dimensions": (
        (X[0], WEIGHT),
        {"cu_seqlens": CU[None]},
        ValueError,
        "cu_seqlens must have shape",
    ),
    "unknown backend": ((X, WEIGHT), {"backend": "cuda"}, ValueError, "backend must be None or one of .* got 'cuda'"),
}
OUT_OF_ORDER = {
    "descending": ([0, 4, 2, 5], "cu_seqlens must not descend, got 4 followed by 2 at index 2"),
    "short": ([0, 4], "cu_seqlens must run from 0 to the number of rows 5, got 0 to 4"),
    "late": ([1, 5], "cu_seqlens must run from 0 to the number of rows 5, got 1 to 5"),
}
WRONG_STEPS = {
    "time": ((X, STATE, WEIGHT), {}, ValueError, r"x_t must have shape \(B, D\), got \(2, 5, 3\)"),
    "no state": ((X[:, 0], None, WEIGHT), {}, TypeError, "state must be a tensor, got NoneType"),
    "state": ((X[:, 0], STATE[:, 1:], WEIGHT), {}, ValueError, r"state must have shape \(2, 3, 3\), got \(2, 2, 3\)"),
    "out_state": (
        (X[:, 0], STATE, WEIGHT),
        {"out_state": STATE.double()},
        TypeError,
        "out_state must have x's dtype torch.float32, got torch.float64",
    ),
    "activation": ((X[:, 0], STATE, WEIGHT), {"activation": True}, ValueError, "activation must be None, 'silu' or"),
}


@pytest.mark.parametrize("args, more, error, message", WRONG.values(), ids=WRONG)
def test_refuses(args, more, error, message):
    with pytest.raises(error, match=message):
        onchip.causal_conv1d(*args, **more)


@pytest.mark.parametrize("starts, message", OUT_OF_ORDER.values(), ids=OUT_OF_ORDER)
def test_refuses_boundaries(target: Target, starts, message):
    with pytest.raises(ValueError, match=message):
        target.conv(X[0], WEIGHT, cu_seqlens=torch.tensor(starts))


@pytest.mark.parametrize("args, more, error, message", WRONG_STEPS.values(), ids=WRONG_STEPS)
def test_step_refuses(args, more, error, message):
    with pytest.raises(error, match=message):
        onchip.causal_conv1d_step(*args, **more)


def test_matrix_refuses():
    with pytest.raises(ValueError, match="length must be at least 0, got -1"):
        onchip.causal_conv1d_matrix(WEIGHT, -1)
    with pytest.raises(TypeError, match="length must be an integer, got float"):
        onchip.causal_conv1d_matrix(WEIGHT, 3.0)
    with pytest.raises(ValueError, match="at least one tap"):
        onchip.causal_conv1d_matrix(WEIGHT[:, :0], 3)
