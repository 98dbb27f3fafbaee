"""The lines of a run, over interruptions."""

import errno
import json
import os
from pathlib import Path

import pytest

from onchip.training.metrics import Metrics, read_metrics


def test_lines_after_the_checkpoint_are_dropped_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for start, end in ((0, 5), (3, 7)):
        metrics = Metrics(path, start)
        for step in range(start + 1, end + 1):
            metrics.append({"step": step, "run": start})
        metrics.close()
    assert [(line["step"], line["run"]) for line in read_metrics(path)] == [
        (1, 0), (2, 0), (3, 0), (4, 3), (5, 3), (6, 3), (7, 3),
    ]  # fmt: skip


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    metrics.append({"step": 1})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
    metrics.close()


def test_a_last_line_cut_short_is_left_out_and_another_damage_is_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    Metrics(path, 2).close()
    assert path.read_text() == '{"step": 1}\n'
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


def test_a_full_disk_is_an_error_and_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    metrics.append({"step": 1})
    whole = metrics._file

    class NearlyFull:
        """Takes a few bytes of what it is given, as a disk does that is about to be full."""

        def write(self, text: bytes) -> int:
            return whole.write(text[:4])

    monkeypatch.setattr(metrics, "_file", NearlyFull())
    with pytest.raises(OSError) as error:
        metrics.append({"step": 2})
    assert error.value.errno == errno.ENOSPC
    assert error.value.strerror == os.strerror(errno.ENOSPC)
    whole.close()
    Metrics(path, 1).close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}]
