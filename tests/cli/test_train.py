"""`onchip train` as a person or a script meets it."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from onchip.cli.train import train
from onchip.models import load_model
from onchip.training import PRESETS
from onchip.training.metrics import read_metrics

# Small enough for a second or two of training, and long enough to be killed in the middle.
QUICK = ("--preset", "tiny", "--context", "32", "--batch", "4")


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", "from onchip.cli import main; main()", "train", *map(str, arguments)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def onchip(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False, **options,  # type: ignore[call-overload]
    )  # fmt: skip


EACH = """
import json, sys
from onchip.cli import main
for arguments in json.load(sys.stdin):
    try:
        main(["train", *arguments])
    except SystemExit as exit:
        print("exit", exit.code, file=sys.stderr)
"""


def refused(*commands: list[str | Path]) -> list[str]:
    """The one line that each of several commands says when it is refused; one process for all saves their starts."""
    text = json.dumps([list(map(str, arguments)) for arguments in commands])
    done = subprocess.run(
        [sys.executable, "-c", EACH],
        input=text,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    said = done.stderr.splitlines()
    assert said[1::2] == ["exit 2"] * len(commands), done.stderr
    assert all(line.startswith("onchip: ") for line in said[::2]), done.stderr
    return said[::2]


def model(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def lines(run: Path) -> list[dict[str, object]]:
    return [{**line, "tokens_per_second": None} for line in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(30):
        text = "".join(f"line {j} of the text {i}, {'which goes on' * (j % 3)}\n" for j in range(20 + i))
        (folder / f"{i}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run; what it printed is beside it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = onchip(corpus, *QUICK, "--out", folder)
    assert done.returncode == 0, done.stderr
    folder.with_suffix(".out").write_text(done.stdout)
    return folder


def test_a_run_says_what_it_does_and_what_came_of_it(run: Path) -> None:
    out = run.with_suffix(".out").read_text()
    for words in (
        "parameters",
        "held out",
        "step 60/60",
        "tokens/s",
        "gzip -9",
        "xz -9",
        "A new document",
        "onchip show",
    ):
        assert words in out
    report = json.loads((run / "report.json").read_text())
    assert f"this model  {report['bits_per_byte']['model']:.3f}" in out
    assert load_model(run).config.d_model == 32
    assert {path.name for path in run.iterdir()} >= {
        "train.json", "config.json", "model.safetensors", "metrics.jsonl", "checkpoints", "report.json",
    }  # fmt: skip


def test_the_same_command_again_goes_on_and_changes_nothing(run: Path, corpus: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = onchip(corpus, *QUICK, "--out", run)
    assert done.returncode == 0
    assert "going on after step 60" in done.stdout and "gzip -9" in done.stdout
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_another_run_is_never_overwritten(run: Path, corpus: Path, tmp_path: Path) -> None:
    before = model(run)
    (tmp_path / "other").write_text("another text, long enough for a window or two of thirty-two bytes")
    settings, text = refused(
        [corpus, *QUICK, "--lr", "0.5", "--out", run],
        [tmp_path / "other", *QUICK, "--out", run],
    )
    assert "lr 0.01, not 0.5" in settings
    assert "another corpus" in text
    assert model(run) == before


def until(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until the run in `folder` has done `step` steps."""
    path = folder / "metrics.jsonl"
    while not path.exists() or not any(line["step"] >= step for line in read_metrics(path)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
def test_a_run_killed_in_the_middle_ends_as_the_whole_one(run: Path, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    for step in (10, 25):  # before the first checkpoint, and after it
        with subprocess.Popen(
            command(corpus, *QUICK, "--out", folder),
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            until(folder, step, process)
            process.kill()
        assert process.returncode == -signal.SIGKILL
    done = onchip("--out", folder)
    assert done.returncode == 0, done.stderr
    assert "going on after step" in done.stdout
    assert model(folder) == model(run)
    assert lines(folder) == lines(run)


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(run: Path, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    with subprocess.Popen(
        command(corpus, *QUICK, "--out", folder),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until(folder, 3, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT, err
    assert f"Go on with: onchip train --out {folder}" in out
    assert "Traceback" not in err
    assert onchip("--out", folder).returncode == 0
    assert model(folder) == model(run)
    assert lines(folder) == lines(run)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(run: Path, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    size = (run / "model.safetensors").stat().st_size

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))

    done = onchip(corpus, *QUICK, "--out", folder, preexec_fn=small_disk)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "step 20 could not be written" in done.stderr and f"onchip train --out {folder}" in done.stderr
    assert not list(folder.glob("checkpoints/*")) and not list(folder.glob(".*.tmp"))
    assert onchip("--out", folder).returncode == 0
    assert model(folder) == model(run)


def test_every_preset_can_be_named() -> None:
    named = get_args(get_args(get_type_hints(train)["preset"])[0])
    assert sorted(named) == sorted(PRESETS)


def test_a_hybrid_of_your_own_is_trained_and_sampled(corpus: Path, tmp_path: Path) -> None:
    layers = [{"mixer": "mamba2", "d_state": 8, "head_dim": 8}, {"mixer": "attention", "n_heads": 2}]
    described = {"vocab_size": 257, "d_model": 16, "layers": layers, "d_mlp": None}
    (tmp_path / "model.json").write_text(json.dumps(described))
    shape = ("--steps", "2", "--context", "32", "--batch", "1", "--model", tmp_path / "model.json")
    done = onchip(corpus, "--preset", "hybrid", *shape, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "2 layers (mamba2, attention)" in done.stdout and "A new document" in done.stdout


def test_bad_input_is_one_line_before_any_work(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "bad.json").write_text('{"d_model": 3')
    cases: dict[str, list[str | Path]] = {
        "no file or folder": [tmp_path / "nowhere"],
        "found 0 bytes": [tmp_path / "empty"],
        "window of 64 tokens": [tmp_path / "short.txt"],
        "steps: expected 1 or more": [corpus, "--steps", "0"],
        "bad.json": [corpus, "--model", tmp_path / "bad.json"],
        "device: expected": [corpus, "--device", "abacus"],
        "cannot write in /proc/run": [corpus, "--out", "/proc/run"],
    }
    said = refused(*(["--preset", "tiny", "--out", out, *case] for case in cases.values()))
    for words, line in zip(cases, said, strict=True):
        assert words in line
    assert not out.exists()


def test_the_help_says_how_to_go_on_after_an_interruption() -> None:
    done = onchip("--help")
    assert done.returncode == 0
    for words in ("Ctrl-C", "standard library", "gzip", "--preset", "torchrun"):
        assert words in done.stdout
