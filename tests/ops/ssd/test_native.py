"""The native kernels against the reference: in float64 over the whole space of calls, else at twice eager's error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import onchip
from onchip.ops import _native

from .support import ALL_TERMS, F64, LOW, assert_exact, assert_twice_eager, lay_out, randn_case, run, threads

LAYOUTS = ("contiguous", "heads outermost", "last outermost", "every other", "inside a larger tensor")


@st.composite
def calls(draw, packed=False, most=90):
    groups = draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 6))
    dim, state = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    time = draw(st.integers(0, most))
    more = {name: draw(st.booleans()) for name in ("z", "dt_bias", "dt_softplus", "initial_state")}
    more |= {"D": draw(st.sampled_from([False, True, "wide"]))}
    more |= {"dt_limit": draw(st.sampled_from([None, (0.1, 0.8), (0.3, float("inf"))]))}
    more |= {"chunk_size": draw(st.sampled_from([None, 1, 5, 16, 33, 300]))}
    more = {name: value for name, value in more.items() if value}
    boundaries = sorted(draw(st.lists(st.integers(0, time), max_size=4)))
    more |= {"cu_seqlens": [0, *boundaries, time]} if packed else {}
    call = randn_case(
        draw(st.integers(0, 2)), time, heads, dim, groups, state, rate=draw(st.sampled_from([1, 9])), **more
    )
    how = draw(st.sampled_from(LAYOUTS))
    laid = {
        name: lay_out(x, how)
        for name, x in call.arguments.items()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    return call.but(**laid)


@given(call=calls())
@settings(max_examples=100)
def test_any_call(native, call):
    assert_exact(run(call, native), run(call, "reference"))


@given(call=calls(packed=True))
@settings(max_examples=50)
def test_any_packed_call(native, call):
    assert_exact(run(call, native), run(call, "reference"))


@pytest.mark.parametrize("time", [0, 1, 63, 64, 65, 200])
def test_lengths(native, time):
    call = randn_case(2, time, 6, 16, 2, 24, **ALL_TERMS)
    assert_exact(run(call, native), run(call, "reference"))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("time", [1, 63, 100, 257])
@pytest.mark.parametrize("more", [{}, ALL_TERMS], ids=["plain", "all"])
def test_lengths_at_twice_eagers_error(native, time, more, dtype):
    assert_twice_eager(randn_case(1, time, 4, 32, 2, 48, **more).to(dtype), native)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
def test_long_sequences_with_strong_decay_at_twice_eagers_error(dtype):
    call = randn_case(1, 8192, 2, 8, 1, 8, initial_state=True)
    assert_twice_eager(call.but(A=torch.tensor([-1.0, -100.0])).to(dtype), "cpu")


def test_the_same_bits_on_any_number_of_threads(native):
    call = randn_case(2, 300, 8, 32, 2, 48, **ALL_TERMS).to(torch.float32)
    with threads(2):
        two = run(call, native)
    one = run(call, native)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "initial_state"])
def test_nan_shows_from_where_it_is_read(native, name):
    call = randn_case(1, 150, 2, 20, 1, 24, initial_state=True)
    last = tuple(n - 1 for n in call[name].shape)
    call[name][(0, 100, *last[2:]) if name != "initial_state" else last] = torch.nan
    with torch.no_grad():
        got = onchip.ssd(**call.arguments, return_final_state=True, backend=native)
        want = onchip.ssd(**call.arguments, chunk_size=1, return_final_state=True, backend="reference")
    for result, expected in zip(got, want, strict=True):
        assert torch.equal(result.isnan(), expected.isnan())


@pytest.mark.filterwarnings("ignore:A has positive entries")
def test_decay_to_nothing_and_growth_without_bound(native):
    call = randn_case(1, 80, 2, 8, 1, 8, initial_state=True)
    for rate in (-1e6, 0.0, 0.5):  # the last grows: nothing forbids it
        grown = call.but(A=torch.full((2,), rate, dtype=F64))
        assert_exact(run(grown.but(dt=call["dt"] + 0.1), native), run(grown.but(dt=call["dt"] + 0.1), "reference"))


@given(data=st.data())
@settings(max_examples=30)
def test_a_split_anywhere_is_one_pass(native, data):
    call = data.draw(calls())
    time = call["x"].shape[1]
    at = sorted(data.draw(st.lists(st.integers(0, time), min_size=1, max_size=3)))
    with torch.no_grad():
        want = onchip.ssd(**call.arguments, return_final_state=True, backend=native)
        outputs, state = [], call["initial_state"]
        for rows in map(slice, [0, *at], [*at, time]):
            part = {n: call[n][:, rows] for n in ("x", "dt", "B", "C", "z") if call[n] is not None}
            result = onchip.ssd(**(call.but(**part, initial_state=state)).arguments, return_final_state=True)
            outputs.append(result.out)
            state = result.final_state
    torch.testing.assert_close(torch.cat(outputs, 1), want.out, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, want.final_state, rtol=1e-10, atol=1e-10)


@given(call=calls(packed=True))
@settings(max_examples=20)
def test_packed_is_one_by_one(native, call):
    starts = call["cu_seqlens"].tolist()
    with torch.no_grad():
        got = onchip.ssd(**call.arguments, return_final_state=True, backend=native)
        for i, rows in enumerate(map(slice, starts[:-1], starts[1:])):
            part = {n: call[n][None, rows] for n in ("x", "dt", "B", "C", "z") if call[n] is not None}
            state = None if call["initial_state"] is None else call["initial_state"][i : i + 1]
            alone = call.but(**part, initial_state=state, cu_seqlens=None)
            want = onchip.ssd(**alone.arguments, return_final_state=True, backend=native)
            torch.testing.assert_close(got.out[rows], want.out[0], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(got.final_state[i], want.final_state[0], rtol=1e-10, atol=1e-10)
