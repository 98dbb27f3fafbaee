"""What a GPU's figures look like, from made-up rows; and, where there is a GPU, from a measurement of small cases."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from onchip.bench import attention, causal_conv1d, operations, plot_rates, report, rows, selective_scan, ssd, timing
from onchip.bench.cases import GPU_SUITES, Case, cases
from onchip.bench.machine import describe
from onchip.bench.rows import Row
from onchip.bench.timing import Candidate, Quartiles, interleave

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture
def machine():
    cpu = describe("cpu", "default")
    return dataclasses.replace(cpu, name="GPU 1", cores=0, triton="3.6.0", cuda="13.0", driver="580.1")


def row(case, machine):
    times = {"onchip": 2.0, "sdpa_flash": 3.0, "mm": 4.0}
    return Row(
        case, machine, "2026-01-01", "triton", 5,
        {name: Quartiles(0.9 * t, t, 1.1 * t) for name, t in times.items()},
        {"sdpa_flash": Quartiles(1.4, 1.5, 1.6)},
        "copy" if case.suite == "decode" else "mm", {"onchip": 0.625, "sdpa_flash": 0.5},
        {"onchip": 512.3, "sdpa_flash": 345.6, "mm": 800.0},
    )  # fmt: skip


def test_rates_are_shown_and_drawn(tmp_path, machine, capsys, monkeypatch):
    monkeypatch.setattr(report, "console", Console(width=200))
    for suite in ("forward", "decode"):
        some = [row(case, machine) for case in cases(suite, device="cuda")]
        rows.merge(tmp_path / "attention.jsonl", some)
        report.show(suite, some)
    shown = capsys.readouterr().out
    for words in ("TFLOP/s", "GB/s", "512.3", "of copy rate", "CUDA 13.0", "driver 580.1", "triton 3.6.0"):
        assert words in shown
    assert rows.read(tmp_path / "attention.jsonl")[-1].rate["onchip"] == 512.3
    assert plot_rates.attention(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_a_gpu_is_filed_by_its_name(machine):
    assert machine.gpu and machine.slug == "gpu-1"
    assert not describe("cpu", "default").gpu


@pytest.mark.parametrize("with_launches", [False, True])
def test_the_cache_is_flushed_before_the_clock_starts(with_launches, monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("event")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, end):
            return 250.0

    class Flush:
        def zero_(self):
            order.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("idle"))
    monkeypatch.setattr(timing, "_flush", lambda device: Flush())
    call = Candidate(lambda: order.append("call"), with_launches=with_launches)
    times = interleave({"a": call}, torch.device("cuda"), seconds=0.0, min_rounds=2)
    before = "idle" if with_launches else "sleep"
    assert order == ["flush", before, "event", "call", "event", "wait"] * 4  # one to warm up, one to plan, two rounds
    assert times == {"a": [0.25, 0.25]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_make_says_in_a_sentence_that_there_is_no_gpu():
    script = Path(__file__).parents[2] / "benchmarks" / "require_gpu.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert run.returncode == 2 and run.stderr.startswith("This needs ") and run.stderr.count("\n") == 1


@on_gpu
@pytest.mark.parametrize("suite", [suite for suite in GPU_SUITES if suite != "memory"])
def test_small_cases_are_measured(suite):
    case = next(cases(suite, lengths=[256], head_dims=[64], device="cuda"))
    tiny = dataclasses.replace(case, batch=1, heads=4, heads_kv=4)
    here = describe("cuda", "default")
    found = attention.measure(tiny, torch.device("cuda"), here, seconds=0.1)
    assert found.served_by == "triton" and found.rate["onchip"] > 0
    assert {"sdpa_flash", "sdpa_math"} <= found.ratio.keys()
    assert here.driver and here.cuda and here.triton


@on_gpu
@pytest.mark.parametrize("module", [causal_conv1d, selective_scan, ssd], ids=lambda module: module.__name__)
def test_small_cases_of_operations_are_measured(module):
    gpu, here = torch.device("cuda"), describe("cuda", "default")
    for case in module.cases(module.SUITES, dtypes=[], lengths=[256], quick=True, device="cuda"):
        small = dataclasses.replace(case, sizes=tuple((name, min(size, 256)) for name, size in case.sizes))
        found = operations.measure(module.contest, small, here, device=gpu, seconds=0.1, min_rounds=3)
        assert found.served_by == "triton" and found.rate["onchip"] > 0 and found.fraction["onchip"] > 0


@on_gpu
def test_times_are_those_of_the_kernels_and_not_of_their_launch():
    gigabyte = torch.ones(2**28, device="cuda")
    times = interleave({"sum": Candidate(gigabyte.sum)}, torch.device("cuda"), seconds=0.1, min_rounds=5)
    assert min(times["sum"]) > gigabyte.nbytes / 20e12  # no memory is as fast


@on_gpu
def test_a_peer_that_does_not_serve_is_left_out():
    case = Case("forward", "float32", 2, 2, 128, 128, 64)
    names = attention.peers(case, torch.device("cuda"))
    assert "sdpa_flash" not in names and "sdpa_math" in names  # flash has no float32
