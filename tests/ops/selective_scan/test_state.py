"""What a carried state promises: splits, steps, packed sequences and causality."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import onchip

from .support import PER_TOKEN, assert_exact, case, forward


def part(call, start, end, state):
    """The tokens from start to end, from a state on."""
    tokens = {n: call[n][:, start:end] for n in PER_TOKEN if call[n] is not None}
    return call.replace(**tokens, initial_state=state)


@given(data=st.data())
@settings(max_examples=15)
def test_a_split_anywhere_is_one_pass(backend, data):
    time = data.draw(st.integers(1, 150))
    call = case(batch=2, time=time, channels=5, groups=1, states=3)
    cuts = sorted(data.draw(st.lists(st.integers(0, time), max_size=3)))
    outs, state = [], call["initial_state"]
    for start, end in zip([0, *cuts], [*cuts, time], strict=True):
        piece = forward(part(call, start, end, state), backend)
        outs.append(piece["out"])
        state = piece["final_state"]
    assert_exact({"out": torch.cat(outs, 1), "final_state": state}, forward(call, backend))


@pytest.mark.parametrize("in_place", [False, True])
def test_steps_are_the_scan(backend, in_place):
    call = case(time=9)
    state, ys = call["initial_state"].clone(), []
    for t in range(9):
        x, dt, B, C, z = (call[n][:, t] for n in PER_TOKEN)
        more = {n: call[n] for n in ("D", "dt_bias", "dt_softplus")}
        before, kept = state, state.clone()
        y, state = onchip.selective_scan_step(
            x, state, dt, call["A"], B, C, z=z, **more, out_state=state if in_place else None, backend=backend
        )
        assert (state is before) == in_place and (in_place or torch.equal(before, kept))
        ys.append(y)
    assert_exact({"out": torch.stack(ys, 1), "final_state": state}, forward(call, backend))


def test_a_state_in_a_narrower_place_is_rounded_after_the_step(backend):
    call = case(time=1)
    x, dt, B, C = (call[n][:, 0].bfloat16() for n in ("x", "dt", "B", "C"))
    state = call["initial_state"].float() + 1e-3
    place = torch.empty_like(state, dtype=torch.bfloat16)
    want_y, want = onchip.selective_scan_step(x, state, dt, call["A"], B, C, backend=backend)
    y, got = onchip.selective_scan_step(x, state, dt, call["A"], B, C, out_state=place, backend=backend)
    assert got is place and torch.equal(y, want_y) and torch.equal(place, want.bfloat16())


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [0, 3, 0, 90, 2, 0], [64, 128, 63], []], ids=str)
def test_packed_is_one_by_one(backend, lengths):
    call = case(lengths=lengths)
    got, starts = forward(call, backend), call["cu_seqlens"].tolist()
    for i, (start, end) in enumerate(itertools.pairwise(starts)):
        tokens = {n: call[n][None, start:end] for n in PER_TOKEN}
        alone = call.replace(**tokens, initial_state=call["initial_state"][i : i + 1], cu_seqlens=None)
        want = forward(alone, backend)
        assert_exact(
            {"out": got["out"][None, start:end], "final_state": got["final_state"][i : i + 1]},
            {"out": want["out"], "final_state": want["final_state"]},
        )


def test_a_token_changes_nothing_before_it(backend):
    call = case(time=80)
    before = forward(call, backend)["out"]
    for n in PER_TOKEN:
        changed = call[n].clone()
        changed[:, 41:] += 1.0
        after = forward(call.replace(**{n: changed}), backend)["out"]
        assert torch.equal(before[:, :41], after[:, :41]) and not torch.equal(before[:, 41:], after[:, 41:])
