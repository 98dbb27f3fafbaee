"""The benchmark of whole Mambas: every suite is measured, with onchip and truly without, and the table has it."""

import dataclasses
import sys

import pytest
import torch
from typer.testing import CliRunner

from onchip.bench import machine, mamba, operations, plot_mamba, rows
from onchip.cli.bench import bench
from onchip.cli.bench_operations import OPERATIONS

from .test_table import PAGE, table  # noqa: F401

pytest.importorskip("transformers", reason="runs models of transformers (pip install 'onchip[dev]')")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 4}
    monkeypatch.setattr(mamba, "SMALL", shape)
    two = {**mamba.MAMBA2_130M, **shape, "num_heads": 4, "head_dim": 8}
    monkeypatch.setattr(mamba, "MAMBA2_130M", two)
    monkeypatch.setattr(mamba, "SMALL2", two)
    mamba._made.cache_clear()
    yield
    mamba._made.cache_clear()


def measured(case):
    here = machine.describe("cpu", "default")
    return operations.measure(mamba.contest, case, here, seconds=0.0, min_rounds=2)


@pytest.mark.parametrize("suite", [*mamba.SUITES, *mamba.ON_REQUEST])
def test_every_suite_is_measured(suite, tmp_path):
    for case in mamba.cases([suite], dtypes=[], lengths=[40], quick=False):
        row = measured(case)
        assert row.served_by == "cpu" and row.rounds == 2 and row.ratio["transformers"].median > 0
        assert (row.of, bool(row.fraction)) == (("read", True) if suite == "step" else ("", False))
        decoding = suite in ("step", "context")
        assert row.figures.keys() == ({"state, KB"} if decoding else {"µs a token"})
        rows.merge(tmp_path / "rows.jsonl", [row])
        assert row in rows.read(tmp_path / "rows.jsonl")


def test_the_state_does_not_grow():
    found = [measured(case).figures for case in mamba.cases(["context"], dtypes=[], lengths=[5, 50], quick=False)]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_without_onchip_nothing_of_it_runs(name):
    mamba._model(name.title(), mamba.SMALL if name == "mamba" else mamba.SMALL2, "float32")
    module = sys.modules[f"transformers.models.{name}.modeling_{name}"]
    ours = {key for key, f in vars(module).items() if hasattr(f, "through_onchip")}
    with pytest.raises(KeyError), mamba.without_onchip(name):
        assert ours and not any(hasattr(f, "through_onchip") for f in vars(module).values())
        raise KeyError
    assert ours == {key for key, f in vars(module).items() if hasattr(f, "through_onchip")}


@pytest.mark.parametrize("suite", ["forward", "train", "step"])
def test_what_is_wrong_is_not_timed(suite, monkeypatch):
    (case,) = mamba.cases([suite], dtypes=["float32"], lengths=[40], quick=False)
    held = mamba.contest(case)
    ours = held.contenders["onchip"]
    off = operations.Contender(ours.call, lambda results: tuple(1.001 * x for x in results), checked=ours.found)
    wrong = operations.Contest(**{**vars(held), "contenders": {**held.contenders, "onchip": off}})
    with pytest.raises(ArithmeticError, match="logits is off by"):
        operations.check(case, wrong)


def test_the_picture_has_passes_steps_and_both_mallocs(tmp_path):
    plan = mamba.cases(("forward", "train", "context"), dtypes=[], lengths=[8, 40], quick=False)
    found = [measured(case) for case in plan]
    tuned = [dataclasses.replace(row, machine=dataclasses.replace(row.machine, malloc="tuned")) for row in found]
    rows.merge(tmp_path / "mamba.jsonl", [*found, *tuned])
    assert plot_mamba.mamba(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_command_and_table(tmp_path, monkeypatch, table):  # noqa: F811
    for name, value in machine.environment("default").items():
        monkeypatch.setenv(name, value)
    for name in machine.TUNED_MALLOC:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    options = ["--lengths", "40", "--quick", "--threads", "1", "--out", str(tmp_path / "cpu")]
    run = CliRunner().invoke(bench, ["mamba", "--suite", "forward,once,step", *options])
    torch.set_num_threads(before)
    assert run.exit_code == 0, run.output
    assert "µs a token" in run.output and "state, KB" in run.output
    assert "mamba.png" in run.output and (tmp_path / "cpu" / "mamba.png").read_bytes().startswith(b"\x89PNG")
    text = table.updated(PAGE, tmp_path)
    for line in ("forward", "a training step, T 1024"):
        assert f"| Mamba of transformers, 4 layers of 256, {line} | without onchip |" in text
    assert text.count("| Mamba-2 130M's shape, a decoding step, ") == 2 and "% of read rate" in text
    assert "a training step, T 256" not in text


def test_the_table_has_a_line_for_each_benchmark(table):  # noqa: F811
    assert {line.operation for line in table.LINES} == {None, *OPERATIONS}
