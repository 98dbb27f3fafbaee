"""`onchip bench`: the whole way, over tiny cases. No figure is asserted, only that it is there."""

import subprocess
import sys

import pytest
import torch

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line():
    run = bench("--device", "cuda")
    assert run.returncode == 2 and run.stderr == "onchip: --device cuda: PyTorch finds no GPU here\n"


@pytest.mark.parametrize("suite", ["bf16", "overhead"])
def test_what_a_gpu_has_no_suite_for_is_refused(suite):
    run = bench("--device", "cuda", "--suite", suite)
    assert run.returncode == 2 and run.stderr.startswith("onchip: --suite must be some of forward, backward, decode,")


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpus_rows_table_and_picture(tmp_path):
    run = bench("--device", "cuda", "--suite", "forward,backward,decode", "--lengths", "1024", "--out", str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert "TFLOP/s" in run.stdout and "copy rate" in run.stdout
    found = rows.read(tmp_path / "attention.jsonl")
    assert {row.case.suite for row in found} == {"forward", "backward", "decode"}
    assert all(row.served_by == "triton" and row.machine.gpu and row.machine.driver for row in found)
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
