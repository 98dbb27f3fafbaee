"""What is told of a finished run."""

import io
import json
import sys
from collections.abc import Callable

import pytest
from rich.console import Console

from onchip.training import Trainer, compressed_bits_per_byte
from onchip.training.metrics import read_metrics
from onchip.training.progress import Bar, Lines, display
from onchip.training.report import describe, make_report, read_report, write_report


def test_a_report_is_what_was_measured(trainer: Callable[..., Trainer]) -> None:
    run = trainer()
    run.train()
    assert read_report(run.folder) is None
    report = make_report(run)
    write_report(run.folder, report)
    assert read_report(run.folder) == report
    rivals = compressed_bits_per_byte(run.corpus.held_out)
    assert report["bits_per_byte"] == {"model": run.evaluate(), **rivals}
    assert report["held_out_bytes"] == sum(len(document.data) for document in run.corpus.held_out)
    assert (report["steps"], report["tokens"]) == (8, 8 * 64)
    assert report["sample"] == make_report(run)["sample"]
    run.folder.report.write_text("{")
    with pytest.raises(ValueError, match=r"report\.json is damaged"):
        read_report(run.folder)


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [(2.5, "Both compressors are ahead yet"), (1.7, "better than gzip -9."), (1.2, "better than gzip -9 and xz -9.")],
)
def test_the_verdict_follows_the_figures(ours: float, verdict: str) -> None:
    figures = {"model": ours, "gzip -9": 1.9, "xz -9": 1.5}
    text = describe({"bits_per_byte": figures, "held_out_bytes": 1000})
    assert verdict in text
    assert f"this model  {ours:.3f}" in text


def test_a_loss_curve_is_a_picture(trainer: Callable[..., Trainer]) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    for name, changes in {"usual": {}, "one step": {"steps": 1, "evaluate_every": 5}}.items():
        run = trainer(name, **changes)
        run.train()
        write_report(run.folder, make_report(run))
        height, width, _ = imread(run.folder.curve).shape
        assert width > height > 400


def test_without_matplotlib_there_is_a_report_and_no_curve(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer()
    run.train()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_report(run.folder, make_report(run))
    assert read_report(run.folder) is not None
    assert not run.folder.curve.exists()


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(trainer: Callable[..., Trainer]) -> None:
    for terminal, kind in ((True, Bar), (False, Lines)):
        out = io.StringIO()
        shown = display(Console(file=out, force_terminal=terminal, width=120), steps=8, done=0)
        assert type(shown) is kind
        run = trainer(kind.__name__)
        run.train(shown)
        text = out.getvalue()
        assert "tokens/s" in text and "left" in text and "loss" in text
        for line in read_metrics(run.folder.metrics):
            if "validation_bits_per_byte" in line:
                assert f"held out {line['validation_bits_per_byte']:.3f} bits per byte" in text
    assert len(text.splitlines()) == 8


def test_lines_are_few(config: object) -> None:
    out = io.StringIO()
    shown = Lines(Console(file=out, width=120), steps=1000, done=0)
    for step in range(1, 1001):
        shown.show({"step": step, "loss": 1.0, "tokens_per_second": 10.0})
    assert len(out.getvalue().splitlines()) == 20


def test_reports_are_json_for_people(trainer: Callable[..., Trainer]) -> None:
    run = trainer()
    run.train()
    write_report(run.folder, make_report(run))
    assert json.loads(run.folder.report.read_text())["held_out_files"]
