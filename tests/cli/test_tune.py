"""`onchip tune`: without a GPU it says so; with one it prints lines for the source."""

import subprocess
import sys

import pytest
import torch


def tune(*arguments):
    command = [sys.executable, "-m", "onchip", "tune", "attention", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    run = tune()
    assert run.returncode == 2 and not run.stdout
    assert run.stderr == "onchip: tune needs a GPU, and PyTorch finds none here\n"


@pytest.mark.parametrize("arguments", [("--passes", "sideways"), ("--head-dims", "100")])
def test_bad_input_is_one_line(arguments):
    run = tune(*arguments)
    assert run.returncode == 2 and run.stderr.startswith(f"onchip: {arguments[0]} must be some of")
    assert run.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_prints_lines_for_the_source():
    run = tune("--passes", "decode", "--head-dims", "128")
    assert run.returncode == 0, run.stderr
    assert '    "decode": (Blocks(' in run.stdout
