"""Timing and the rows it ends in."""

import dataclasses

import pytest
import torch

from onchip.bench import rows, timing
from onchip.bench.cases import Case
from onchip.bench.machine import TUNED_MALLOC, describe, environment
from onchip.bench.timing import Candidate, Quartiles, interleave, ratio

CPU = torch.device("cpu")


def test_candidates_take_turns_and_begin_in_turn(monkeypatch):
    monkeypatch.setattr(timing, "SHORTEST_SAMPLE", 0.0)  # one call a sample
    order = []
    candidates = {name: Candidate(lambda name=name: order.append(name)) for name in "abc"}
    times = interleave(candidates, CPU, seconds=0.0, min_rounds=3)
    assert "".join(order) == "aabbcc" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_scope_is_entered_around_the_call():
    inside = []

    class Scope:
        def __enter__(self):
            inside.append(True)

        def __exit__(self, *_):
            inside.pop()

    def call():
        assert inside

    interleave({"x": Candidate(call, Scope)}, CPU, seconds=0.0, min_rounds=1)
    assert not inside


def test_ratio_is_taken_round_by_round():
    drift = [1.0, 10.0, 100.0, 1000.0, 10000.0]
    assert ratio([3 * x for x in drift], drift) == Quartiles(3.0, 3.0, 3.0)


def test_a_row_survives_its_line_and_replaces_its_elder(tmp_path):
    machine = describe("cpu", "tuned")
    case = Case("window", "float32", 8, 8, 512, 512, 64, causal=True, window=16, grad=True)
    row = rows.Row(
        case, machine, "2026-01-01", "cpu", 5, {"onchip": Quartiles(1.0, 2.0, 3.0)}, {}, "mm", {"onchip": 0.5}
    )
    assert rows.Row.from_json(row.to_json()) == row

    path = tmp_path / "new" / "attention.jsonl"
    other = dataclasses.replace(row, case=dataclasses.replace(case, q_len=1024, k_len=1024))
    rows.merge(path, [row, other])
    newer = dataclasses.replace(row, date="2026-01-02")
    assert rows.merge(path, [newer]) == rows.read(path) == [newer, other]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("malloc", ["default", "tuned"])
def test_environment_sets_and_unsets_the_allocator(malloc):
    found = environment(malloc, {"HOME": "/", **TUNED_MALLOC})
    assert (set(TUNED_MALLOC) <= set(found)) == (malloc == "tuned")
    assert found["HOME"] == "/" and environment(malloc, found) == found


def test_results_are_filed_by_the_kind_of_machine():
    machine = dataclasses.replace(describe("cpu", "default"), name="AMD EPYC(TM) 7", cores=2, capability="AVX2")
    assert machine.slug == "amd-epyc-tm-7-2-core-avx2"
