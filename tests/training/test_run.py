"""A run's folder: found, claimed, never overwritten."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from onchip.training import Request, RunFolder, TrainConfig, Trainer


@pytest.fixture
def request_(config: TrainConfig) -> Request:
    return Request(config, ("/texts/a", "/texts/b"), "f00d")


def test_a_request_comes_back_as_it_was(tmp_path: Path, request_: Request) -> None:
    folder = RunFolder(tmp_path)
    assert folder.request() is None
    folder.begin(request_)
    assert folder.request() == request_
    folder.check(request_)


def test_another_request_is_refused_by_what_differs(tmp_path: Path, request_: Request) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(request_)
    other = dataclasses.replace(request_.config, lr=0.5, seed=3)
    with pytest.raises(ValueError, match=r"lr 0.01, not 0.5; seed 0, not 3.*onchip train --out"):
        folder.check(dataclasses.replace(request_, config=other))
    with pytest.raises(ValueError, match="the files of the corpus have changed"):
        folder.check(dataclasses.replace(request_, fingerprint="beef"))
    with pytest.raises(ValueError, match="another corpus"):
        folder.check(dataclasses.replace(request_, fingerprint="beef", sources=("/texts/c",)))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds files but no training run"):
        RunFolder(tmp_path).request()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"training": {}, "corpus": {"sources": [], "fingerprint": ""}}'])
def test_a_damaged_request_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(ValueError, match=r"train\.json is damaged"):
        RunFolder(tmp_path).request()


def test_a_folder_is_made_and_kept_from_others(tmp_path: Path, request_: Request) -> None:
    folder = RunFolder(tmp_path / "runs" / "one")
    with folder.claimed():
        folder.begin(request_)
        with pytest.raises(ValueError, match="another process is training"), RunFolder(folder.path).claimed():
            pass
    with folder.claimed():
        pass


def test_a_folder_in_which_nothing_began_is_left_as_it_was(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "new").claimed():
        pass
    assert not (tmp_path / "new").exists()
    with RunFolder(tmp_path).claimed():
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_half_written_is_removed(
    tmp_path: Path, trainer: Callable[..., Trainer], request_: Request
) -> None:
    run = trainer("run")
    run.folder.begin(request_)
    run.train()
    whole = sorted(path for path in run.folder.path.rglob("*"))
    half = run.folder.checkpoints / ".step_00000010.new"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (run.folder.path / ".model.safetensors.123.tmp").write_bytes(b"half")
    with run.folder.claimed():
        pass
    assert sorted(path for path in run.folder.path.rglob("*") if path.name != ".lock") == whole


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(PermissionError, match=r"cannot write in .*run: Not a directory"),
        RunFolder(tmp_path / "file" / "run").claimed(),
    ):
        pass
    with pytest.raises(PermissionError, match=r"cannot write in .*file"), RunFolder(tmp_path / "file").claimed():
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_of_another_user_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        os.seteuid(65534)
        try:
            with (
                pytest.raises(PermissionError, match=r"cannot write in .*: Permission denied"),
                RunFolder(Path(name)).claimed(),
            ):
                pass
        finally:
            os.seteuid(0)


def test_the_request_is_json_for_people(tmp_path: Path, request_: Request) -> None:
    RunFolder(tmp_path).begin(request_)
    content = json.loads((tmp_path / "train.json").read_text())
    assert content["training"]["lr"] == 0.01
    assert content["corpus"]["sources"] == ["/texts/a", "/texts/b"]
