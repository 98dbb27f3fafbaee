"""What is written down of each step: one JSON object a line."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from onchip._files import atomic_write


class Metrics:
    """The file `metrics.jsonl` of a run that goes on after `step` steps.

    Lines beyond `step` are dropped, so that an interrupted and resumed run leaves the lines of an uninterrupted one;
    only `tokens_per_second` tells them apart. Each line is given to the system at once: a killed process loses none.
    """

    def __init__(self, path: Path, step: int) -> None:
        lines = [line for line in read_metrics(path) if line["step"] <= step] if path.exists() else []
        with atomic_write(path) as temporary:
            temporary.write_text("".join(map(_text, lines)), encoding="utf-8")
        self._path = path
        self._file = path.open("ab", buffering=0)

    def append(self, line: dict[str, Any]) -> None:
        """Write one line. Raises `OSError` where the disk is full."""
        text = _text(line).encode()
        if self._file.write(text) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def sync(self) -> None:
        """Have the lines so far on the disk; before a checkpoint that stands for them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _text(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `path`. A last line cut short, by a full disk or a power cut, is left out.

    Raises `ValueError` where another line is no JSON object.
    """
    lines: list[dict[str, Any]] = []
    texts = path.read_text().splitlines()
    for number, text in enumerate(texts, 1):
        try:
            lines.append(dict(json.loads(text)))
        except (ValueError, TypeError):
            if number < len(texts):
                raise ValueError(f"{path}: expected a JSON object in line {number}, and got {text[:40]!r}") from None
    return lines
