"""`onchip bench`: the whole way, over tiny cases. No figure is asserted, only that it is there."""

import subprocess
import sys

import pytest

from onchip.bench import rows


def bench(*arguments):
    command = [sys.executable, "-m", "onchip", "bench", "attention", "--quick", "--seconds", "0", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_writes_rows_a_table_and_a_picture(tmp_path):
    some = ("--suite", "forward,window,decode,overhead", "--lengths", "16", "--head-dims", "8", "--threads", "1")
    run = bench(*some, "--malloc", "both", "--out", str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert "torch.mm" in run.stdout and "read rate" in run.stdout
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    found = rows.read(tmp_path / "attention.jsonl")
    assert {(row.case.suite, row.machine.malloc) for row in found} == {
        (suite, malloc) for suite in ("forward", "window", "decode", "overhead") for malloc in ("default", "tuned")
    }
    for row in found:
        assert row.rounds >= 3 and row.ratio
        assert all(0 < low <= median <= high for low, median, high in (*row.ms.values(), *row.ratio.values()))
        assert row.fraction["onchip"] > 0
        assert row.machine.threads == 1 and row.machine.name and row.machine.torch and row.date

    again = bench("--suite", "forward", "--lengths", "16", "--head-dims", "8", "--threads", "1", "--out", str(tmp_path))
    assert again.returncode == 0, again.stderr
    assert len(rows.read(tmp_path / "attention.jsonl")) == len(found)  # the newer row stands in the older one's place


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "taken").write_text("")
    run = bench("--suite", "overhead", "--out", str(tmp_path / "taken"))
    assert run.returncode == 1 and "taken" in run.stderr and run.stderr.count("\n") == 1
