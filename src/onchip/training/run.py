"""A run's folder: whose it is, what it was asked to do, how far it has come."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from onchip.training.checkpoint import write_json
from onchip.training.config import TrainConfig


@dataclass(frozen=True)
class Request:
    """What a run was asked to do: settings, the sources and fingerprint of the corpus, and the model it began with."""

    config: TrainConfig
    sources: tuple[str, ...]
    fingerprint: str
    init_from: str | None = None


@dataclass(frozen=True)
class RunFolder:
    """The folder that a run writes.

    train.json                        the request: every setting, the corpus
    config.json, model.safetensors    the model as of the last checkpoint, for `load_model`
    tokenizer.json                    where the run began with a model that has one
    metrics.jsonl                     a line per step
    checkpoints/                      the last two
    report.json, loss.png             once it has ended
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The file of metrics."""
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        """The file of results."""
        return self.path / "report.json"

    @property
    def curve(self) -> Path:
        """The loss curve."""
        return self.path / "loss.png"

    @property
    def _request(self) -> Path:
        return self.path / "train.json"

    def request(self) -> Request | None:
        """What the run in this folder was asked to do; None where there is no run yet.

        Raises `ValueError` where the file that says so is damaged, or where the folder holds something else.
        """
        if not self._request.exists():
            if self.path.is_dir() and any(not path.name.startswith(".") for path in self.path.iterdir()):
                raise ValueError(f"{self.path} holds files but no training run: choose another folder")
            return None
        try:
            content = json.loads(self._request.read_bytes())
            config = TrainConfig.from_dict(content["training"])
            corpus = content["corpus"]
            return Request(config, tuple(corpus["sources"]), corpus["fingerprint"], content.get("init_from"))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self._request} is damaged: {error}") from None

    def begin(self, request: Request) -> None:
        """Write down what the run in this folder is asked to do."""
        corpus = {"sources": list(request.sources), "fingerprint": request.fingerprint}
        begun = {} if request.init_from is None else {"init_from": request.init_from}
        write_json(self._request, {"corpus": corpus, **begun, "training": request.config.to_dict()})

    def check(self, request: Request) -> None:
        """See that the run in this folder, where there is one, was asked to do the same.

        Raises `ValueError` naming what differs.
        """
        before = self.request()
        if before is None:
            return
        differences = before.config.differences(request.config)
        if before.init_from != request.init_from:
            differences.append(f"begun from {before.init_from or 'nothing'}, not {request.init_from or 'nothing'}")
        if before.fingerprint != request.fingerprint:
            differences.append(
                "another corpus" if before.sources != request.sources else "the files of the corpus have changed"
            )
        if differences:
            raise ValueError(
                f"{self.path} holds a run with other settings ({'; '.join(differences)}): "
                f"choose another folder, or go on with that run by `{resume_command(self.path)}`"
            )

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder and keep other runs out of it for the length of a `with` block.

        A folder in which no run began is left as it was found. Raises `PermissionError` where it cannot be written,
        `ValueError` where another process trains in it.
        """
        new, lock_file = not self.path.exists(), self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = lock_file.open("w")
        except OSError as error:
            raise PermissionError(f"cannot write in {self.path}: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process is training in {self.path}") from None
            self._sweep()
            try:
                yield
            finally:
                if not self._request.exists():
                    lock_file.unlink()
                    if new:
                        with suppress(OSError):
                            self.path.rmdir()

    def _sweep(self) -> None:
        """Remove what a killed process left half written."""
        for path in [*self.path.glob(".*.tmp"), *self.checkpoints.glob(".step_*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def resume_command(folder: Path) -> str:
    """What to type to go on with the run in `folder`."""
    return f"onchip train --out {folder}"


def absolute(sources: Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    """The sources as they can be found from any folder."""
    return tuple(str(Path(source).absolute()) for source in sources)
