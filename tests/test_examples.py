"""What README.md and examples/ show is what happens."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def run(*arguments, **options):
    finished = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **options)
    assert finished.returncode == 0, finished.stderr
    assert not finished.stderr
    return finished.stdout


@pytest.mark.skipif(importlib.util.find_spec("onchip._native") is None, reason="it shows the native kernel serving")
@pytest.mark.parametrize(
    "code, output", re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", README, re.DOTALL), ids=["first"]
)
def test_readme_shows_what_its_code_prints(code, output):
    assert run("-c", code) == output


def test_readme_is_short_and_its_links_lead_somewhere():
    assert README.count("\n") <= 120
    named = re.findall(r"\]\(([^):]+)\)", README) + re.findall(r"`((?:src|native|reproductions)/[^` ]*)`", README)
    assert len(named) > 5
    for path in named:
        assert (ROOT / path).exists(), path


def test_readme_has_the_figures_of_the_rows():
    run(ROOT / "benchmarks" / "table.py", "--check")


def test_drop_in():
    shown = run(ROOT / "examples" / "drop_in.py")
    difference = float(re.search(r"gradients: (\S+) of", shown)[1])
    assert difference < 1e-4  # a hundred roundings of float32, where a wrong mask or scale would show as 1e-1
    assert "as far as token 31\n" in shown
    assert "alone: True" in shown


def test_train_and_sample():
    shown = run(ROOT / "examples" / "train_and_sample.py", "30")
    before, after = map(float, re.match(r"(\S+) bits per byte before, (\S+) after", shown).groups())
    assert after < before
    assert shown.count("\n") == 3
