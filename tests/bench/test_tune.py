"""The search for tile shapes, with times made up; and, where there is a GPU, with its own."""

import importlib.util
import math

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
if importlib.util.find_spec("triton"):
    from onchip.bench import tune
    from onchip.bench.tune import Entry, descend, neighbours
    from onchip.ops import _triton
    from onchip.ops.attention.triton.blocks import Blocks
    from onchip.ops.attention.triton.launches import DECODE_ROWS

PASSES = ("forward", "decode", "keys", "queries", "bias")


def test_neighbours_are_one_step_away_and_possible():
    found = list(neighbours(Blocks(16, 64, 4, 1)))
    assert found == [
        Blocks(32, 64, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 128, 4, 1), Blocks(16, 64, 8, 1), Blocks(16, 64, 4, 2)
    ]  # fmt: skip


def distance(shape, goal):
    return sum(abs(math.log2(a / b)) for a, b in zip(shape, goal, strict=True))


def test_the_fastest_is_reached_and_nothing_is_timed_twice():
    goal, timed = Blocks(64, 128, 8, 3), []

    def seconds(shape):
        timed.append(shape)
        return 1 + distance(shape, goal)

    assert descend(Blocks(16, 32, 4, 1), seconds) == (goal, 1.0)
    assert len(timed) == len(set(timed))


def test_what_does_not_run_is_walked_around():
    goal = Blocks(64, 64, 4, 1)
    fits = lambda shape: shape.keys * shape.stages <= 64  # noqa: E731
    seconds = lambda shape: 1 + distance(shape, goal) if fits(shape) else None  # noqa: E731
    assert descend(Blocks(16, 16, 4, 3), seconds)[0] == goal
    with pytest.raises(ValueError, match=r"rows=16, keys=64, warps=4, stages=2.*does not run"):
        descend(Blocks(16, 64, 4, 2), seconds)


def test_a_gain_within_the_noise_is_no_reason_to_move():
    start = Blocks(64, 64, 4, 2)
    for gain, moves in ((0.99, False), (0.95, True)):
        best, _ = descend(start, lambda shape, gain=gain: 1.0 if shape == start else gain)
        assert (best != start) is moves


@pytest.mark.parametrize("float32", [False, True])
@pytest.mark.parametrize("of", PASSES)
def test_the_pass_is_launched_with_the_shape(monkeypatch, of, float32):
    monkeypatch.setattr(_triton, "architecture", lambda device: "sm_90")
    entry, meta = Entry(of, 128, float32), torch.device("meta")
    call, start = tune.call_of(entry, meta), entry.start(meta)
    assert start == call.blocks(of)
    made = tune.launches_of(entry, meta)
    shape = start._replace(rows=32, keys=32, warps=8, stages=5)
    own = made(shape)[0]
    assert (own.warps, own.stages) == (8, 5)
    rows_and_keys = [x for x in own.arguments if type(x) is int and x == 32]
    assert len(rows_and_keys) >= 2
    assert call.q.shape[-1] == 128 and call.q.itemsize == (4 if float32 else 2)
    assert (call.longest[0] * call.features.group <= DECODE_ROWS) == (of == "decode")


@pytest.mark.parametrize("of", PASSES)
def test_the_tables_own_shape_is_timed(monkeypatch, of):
    device, announced = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []
    if (reason := _triton.limits(device)) is not None:
        pytest.skip(reason)
    for name, value in {"TOKENS": 32, "LENGTH": 32, "WIDTH": 256, "DECODED": 32}.items():
        monkeypatch.setattr(tune, name, value)
    entry = Entry(of, 256, float32=True)  # which the interpreter computes rightly
    assert entry.timer(device, announced.append)(entry.start(device)) > 0
    assert announced == [f"{of}, head dim 256: {entry.start(device)}"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("of", [of for of in PASSES if of != "bias"])  # whose tiles are not loaded ahead
def test_a_shape_with_more_shared_memory_than_there_is_is_passed_over(of):
    timer = Entry(of, 128).timer(torch.device("cuda"), lambda what: None)
    assert timer(Blocks(64, 128, 4, 16)) is None
