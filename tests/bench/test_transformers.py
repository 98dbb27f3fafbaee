"""The benchmark of transformers' models: it times what is right, keeps rows, and the table has them."""

import os

import pytest
import torch
from typer.testing import CliRunner

from onchip.bench import machine, rows
from onchip.bench import transformers as models
from onchip.bench.cases import MODEL_SUITES, model_cases
from onchip.cli.bench import bench

from .test_table import PAGE, table  # noqa: F401

pytest.importorskip("transformers", reason="runs models of transformers (pip install 'onchip[dev]')")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shape = {**models.SMOLLM2, "vocab_size": 99, "intermediate_size": 64, "num_hidden_layers": 2}
    monkeypatch.setattr(models, "SMOLLM2", shape)
    models.model_of.cache_clear()
    yield
    models.model_of.cache_clear()


@pytest.mark.parametrize("suite", MODEL_SUITES)
def test_every_suite_is_measured(suite):
    here = machine.describe("cpu", "default")
    for case in model_cases(suite, lengths=[9]):
        row = models.measure(case, here, seconds=0.0, min_rounds=2)
        peer = "attention" if suite == "glue" else "sdpa"
        assert set(row.ms) == {"onchip", peer} and set(row.ratio) == {peer} and row.rounds == 2
        assert row.served_by == "cpu" and (row.case.q_len, row.case.k_len) == (9 if suite == "prefill" else 1, 9)


def test_a_step_leaves_the_cache_as_it_was():
    model = models.model_of("float32")
    past = model(torch.zeros(1, 5, dtype=torch.int64), use_cache=True).past_key_values
    models._step(model, torch.zeros(1, 1, dtype=torch.int64), past)
    assert past.get_seq_length() == 5


def test_what_is_wrong_is_not_timed(monkeypatch):
    logits = models._logits
    monkeypatch.setattr(
        models, "_logits", lambda model, name, x: logits(model, name, x) * (1 + 1e-3 * (name == "onchip"))
    )
    with pytest.raises(ArithmeticError, match="SmolLM2's shape in float32: logits is off by"):
        models.model_of("float32")


def test_command_and_table(tmp_path, monkeypatch, table):  # noqa: F811
    for name, value in machine.environment("default").items():
        monkeypatch.setenv(name, value)
    for name in set(os.environ) - set(machine.environment("default")):
        monkeypatch.delenv(name)
    before = torch.get_num_threads()
    out = tmp_path / "cpu"
    run = CliRunner().invoke(bench, ["transformers", "--lengths", "9", "--quick", "--threads", "1", "--out", str(out)])
    torch.set_num_threads(before)
    assert run.exit_code == 0, run.output
    found = rows.read(out / "transformers.jsonl")
    assert {(row.case.suite, row.case.dtype) for row in found} == {
        ("prefill", "float32"), ("prefill", "bfloat16"), ("step", "float32"), ("step", "bfloat16"), ("glue", "float32")
    }  # fmt: skip
    text = table.updated(PAGE, tmp_path)
    assert text.count("SmolLM2-135M's shape in transformers") == 4
    assert "| SmolLM2-135M's shape in transformers, a decoding step, bfloat16 | SDPA |" in text
    assert "beyond onchip.attention's call" in text
