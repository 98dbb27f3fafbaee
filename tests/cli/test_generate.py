"""`onchip generate`: what a person sees and types."""

import io
import sys

import pytest
import torch

from onchip.cli import main
from onchip.generation import generate
from onchip.models import LanguageModel, ModelConfig, save_model


@pytest.fixture
def folder(tmp_path):
    config = ModelConfig(vocab_size=257, d_model=16, layers=[{"mixer": "attention", "n_heads": 2}], d_mlp=24)
    model = LanguageModel(config)
    with torch.no_grad():
        model.embedding.weight[128:] = 0  # ASCII is likelier
    save_model(model, tmp_path)
    return tmp_path


@pytest.fixture
def run(capsysbinary):
    def run(*arguments):
        with pytest.raises(SystemExit) as exited:
            main(["generate", *map(str, arguments)])
        out, err = capsysbinary.readouterr()
        return exited.value.code, out.decode(), err.decode()

    return run


def test_the_text_is_that_of_the_library(run, folder):
    from onchip.models import load_model

    (expected,) = generate(load_model(folder), ["def "], max_new_tokens=30, temperature=0.8, seed=3)
    code, out, err = run(folder, "--prompt", "def ", "--max-new-tokens", "30", "--seed", "3")
    assert (code, out) == (0, f"def {expected.text}\n")
    assert err.startswith(f"{len(expected.tokens)} bytes in ")


def test_prompts_come_one_after_the_other(run, folder, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes(b"from a \xff file")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped")))
    arguments = ["--prompt", "typed", "--prompt-file", tmp_path / "prompt.txt", "--prompt-file", "-"]
    code, out, _ = run(folder, *arguments, "--samples", "2", "--max-new-tokens", "12", "--seed", "0")
    assert code == 0
    places = [
        out.index(f"── {i} of 6 ──\n{begins}")
        for i, begins in enumerate(
            ["typed", "typed", "from a \ufffd file", "from a \ufffd file", "piped", "piped"], start=1
        )
    ]
    assert places == sorted(places)


def test_a_terminal_is_not_sent_control_characters(monkeypatch):
    from onchip.cli.generate import _visible

    assert _visible("\x1b[2J") == "\x1b[2J"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert _visible("a\x1b[2J\n\t\x00\x7fé") == "a␛[2J\n\t␀␡é"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--top-p", "0"], "top_p must be in (0, 1], got 0.0"),
        (["--temperature", "-1"], "temperature must be finite and not negative, got -1.0"),
        (["--top-k", "0"], "top_k must be at least 1"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--stop", ""], "stop must not contain the empty string"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--device", "abacus"], "abacus"),
        (["--samples", "0"], "--samples"),
    ],
)
def test_bad_input_is_one_line(run, folder, arguments, named):
    code, out, err = run(folder, *arguments)
    assert (code, out) == (2, "")
    assert named in err and err.count("\n") == 1


def test_a_folder_without_a_model_is_named(run, tmp_path):
    code, _, err = run(tmp_path / "nothing")
    assert code == 2 and f"there is no folder {tmp_path / 'nothing'}" in err
    (tmp_path / "empty").mkdir()
    code, _, err = run(tmp_path / "empty")
    assert code == 2 and "holds no model" in err


def test_a_damaged_model_is_named(run, folder):
    (folder / "model.safetensors").write_bytes(b"\x10" * 40)
    code, _, err = run(folder)
    assert code == 2 and "model.safetensors is damaged" in err and err.count("\n") == 1
