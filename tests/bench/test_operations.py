"""The frame that benchmarks of operations share: nothing wrong is timed, and rows come back as they went."""

import dataclasses
import subprocess
import sys

import pytest

from onchip.bench import causal_conv1d, machine, operations, rows, selective_scan
from onchip.bench.operations import Contender

CASES = causal_conv1d.cases(causal_conv1d.SUITES, dtypes=[], lengths=[9], quick=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_contenders_agree_and_are_timed(case, tmp_path):
    held = causal_conv1d.contest(case)
    operations.check(case, held)
    last = Contender(list(held.contenders.values())[2].call)
    operations.check(case, dataclasses.replace(held, contenders={"onchip": last, "conv1d": held.contenders["conv1d"]}))
    row = operations.measure(causal_conv1d.contest, case, machine.describe("cpu", "default"), seconds=0.0, min_rounds=3)
    assert row.rounds >= 3 and row.ratio.keys() == {"conv1d", "onchip (B, D, T)"} and row.fraction["onchip"] > 0
    rows.merge(tmp_path / "rows.jsonl", [row])
    assert rows.read(tmp_path / "rows.jsonl") == [row]
    assert len(rows.merge(tmp_path / "rows.jsonl", [row])) == 1


def test_what_is_wrong_is_not_timed():
    def wrong(case):
        held = causal_conv1d.contest(case)
        ours = held.contenders["onchip"]
        off = Contender(lambda: tuple(x + 0.01 for x in ours.call()))
        return dataclasses.replace(held, contenders=held.contenders | {"onchip": off})

    with pytest.raises(ArithmeticError, match=r"float32 T 9 .* out is off by 1\.0e-02"):
        operations.check(CASES[0], wrong(CASES[0]))


@pytest.mark.slow
def test_the_command(tmp_path):
    options = ("--suite", "forward", "--dtype", "float32", "--lengths", "9", "--threads", "1", "--seconds", "0")
    command = [sys.executable, "-m", "onchip", "bench", "causal_conv1d", "--quick", *options, "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "causal_conv1d, forward" in run.stdout and "over conv1d" in run.stdout
    assert [row.case for row in rows.read(tmp_path / "causal_conv1d.jsonl")] == CASES[:1]


@pytest.mark.parametrize("suite", selective_scan.SUITES)
def test_the_selective_scan_and_its_peers_agree(suite):
    pytest.importorskip("transformers")
    (case,) = selective_scan.cases([suite], dtypes=[], lengths=[9], quick=True)
    operations.check(case, selective_scan.contest(case))
