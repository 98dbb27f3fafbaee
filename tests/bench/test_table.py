"""The table of a GPU in docs/speed.md: made from its rows where there are any, and else it says that there are none."""

import dataclasses
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from onchip.bench import rows, ssd
from onchip.bench.cases import cases
from onchip.bench.machine import describe
from onchip.bench.rows import Row
from onchip.bench.timing import Quartiles

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "speed.md").read_text()


@pytest.fixture(scope="module")
def table():
    spec = spec_from_file_location("table", ROOT / "benchmarks" / "table.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def measured():
    """A row for each case that `make bench-gpu` measures, each with another rate."""
    versions = {"torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0", "driver": "580.1", "commit": "abc123"}
    machine = dataclasses.replace(describe("cpu", "default"), name="GPU 1", cores=0, **versions)
    plan = [case for suite in ("forward", "backward", "decode") for case in cases(suite, device="cuda")]
    times = {"onchip": Quartiles(1.0, 1.0, 1.0)}
    return [
        Row(
            case, machine, "2026-01-02", "triton", 5, times,
            {"sdpa_flash": times["onchip"]}, "copy" if case.suite == "decode" else "mm", {"onchip": 0.5},
            {"onchip": 1000.0 + number, "sdpa_flash": 2000.0 + number},
        )
        for number, case in enumerate(plan)
    ]  # fmt: skip


def test_every_published_case_is_one_that_is_measured(table, measured):
    lines = table.gpu_table(measured).splitlines()
    assert "not run" not in table.gpu_table(measured)
    for published, line in zip(table.PUBLISHED, lines[2:], strict=False):
        (row,) = (
            row for row in measured
            if all(getattr(row.case, name) == value for name, value in published.where.items())
        )  # fmt: skip
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[5:8] == [f"{row.rate['onchip']:.0f}", f"{row.rate['sdpa_flash']:.0f}", "–"]
        assert cells[8] == ("50% of copy rate" if row.case.suite == "decode" else "50% of torch.mm")
    for words in ("GPU 1", "2026-01-02", "2.11.0", "3.6.0", "13.0", "580.1", "abc123"):
        assert words in lines[-1]


def test_other_operations_have_a_table_of_their_own(table, measured):
    (step,) = ssd.cases(["step"], dtypes=[], lengths=[], quick=False, device="cuda")
    row = dataclasses.replace(
        measured[-1], case=step, rate={"onchip": 3210.4}, ratio={"mamba_ssm": Quartiles(1, 1.26, 2)}
    )
    assert table.operation_lines([row])[2:] == [
        "| ssd step, bfloat16, B 128, H 32, P 64, N 128 | 3210 | 50% of copy rate | 1.26× |"
    ]
    lines = table.gpu_table([*measured, row]).splitlines()
    assert "not run" not in "".join(lines) and lines.count("") == 2
    assert lines.index(table.operation_lines([row])[2]) == 2 + len(table.PUBLISHED) + 3


def test_without_rows_it_claims_nothing(table):
    text = table.gpu_table([])
    assert "No GPU was at hand: nothing was measured on one." in text
    assert text.count("not run") == len(table.PUBLISHED)


def test_the_page_has_a_gpus_rows_where_there_are_any(table, measured, tmp_path):
    none = table.updated(PAGE, tmp_path)
    assert "No GPU was at hand" in none
    rows.merge(tmp_path / "gpu-1" / "attention.jsonl", measured)
    some = table.updated(PAGE, tmp_path)
    assert "No GPU was at hand" not in some and "GPU 1" in some
    assert table.updated(some, tmp_path) == some


def test_the_page_says_no_gpu_was_at_hand_unless_there_are_rows_of_one(table):
    machines = [rows.read(path) for path in table.RESULTS.glob("*/attention.jsonl")]
    on_gpu = any(row.machine.gpu for machine in machines for row in machine)
    assert ("No GPU was at hand" in PAGE) is not on_gpu
