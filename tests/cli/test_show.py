"""`onchip show`: a picture beside the model."""

import io
import sys

import pytest

from onchip.cli import main
from onchip.models import LanguageModel, ModelConfig, save_model


@pytest.fixture
def folder(tmp_path):
    config = ModelConfig(vocab_size=257, d_model=16, layers=[{"mixer": "attention", "n_heads": 2}], d_mlp=24)
    save_model(LanguageModel(config), tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as exited:
            main(["show", *map(str, arguments)])
        return exited.value.code, *capsys.readouterr()

    return run


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_the_picture_lies_beside_the_model(run, folder):
    assert run(folder) == (0, f"{folder / 'mixing.png'}\n", "")
    assert is_png(folder / "mixing.png")


def test_a_long_file_is_cut_and_that_is_said(run, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff" * 100)))
    code, out, err = run(folder, "--file", "-", "--length", "60", "--out", folder / "other.png")
    assert (code, out) == (0, f"{folder / 'other.png'}\n")
    assert "first 60 of 100 bytes" in err
    assert is_png(folder / "other.png")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--file", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--out", "no/such/folder/a.png"], "no/such/folder"),
        (["--length", "0"], "--length"),
    ],
)
def test_bad_input_is_one_line(run, folder, arguments, named):
    code, out, err = run(folder, *arguments)
    assert (code, out) == (2, "")
    assert named in err and err.count("\n") == 1


def test_without_matplotlib_the_way_to_get_it_is_named(run, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(folder)
    assert code == 1 and "pip install onchip[plot]" in err and err.count("\n") == 1
