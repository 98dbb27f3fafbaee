"""The reproductions run, small, and their verdicts can go both ways. Speed is measured but not asserted."""

import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from onchip.bench.timing import Quartiles

REPRODUCTIONS = Path(__file__).parent.parent / "reproductions"


@pytest.fixture(scope="module")
def flashattention():
    spec = spec_from_file_location("flashattention", REPRODUCTIONS / "flashattention.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.slow
def test_flashattention_runs(tmp_path):
    script = [sys.executable, str(REPRODUCTIONS / "flashattention.py"), "--quick", "--out", str(tmp_path)]
    run = subprocess.run(script, capture_output=True, text=True, check=False)
    verdicts = re.findall("PASS|FAIL", run.stdout)
    assert len(verdicts) == 3, run.stderr
    assert run.returncode == ("FAIL" in verdicts)
    assert verdicts[0] == "PASS"  # exactness; the sequences are too short here for the others to say much
    assert (tmp_path / "flashattention.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "ours, eager, holds",
    [([1, 2, 4], [1, 4, 16], True), ([1, 4, 16], [1, 4, 16], False), ([1, 2, 4], [1, 2, 4], False)],
)
def test_memory_is_judged_by_its_growth(flashattention, ours, eager, holds):
    finding = flashattention.linear_memory([512, 1024, 2048], {"onchip": ours, "sdpa_math": eager})
    assert finding.holds is holds


@pytest.mark.parametrize("speeds, holds", [([1.5, 2.0, 3.0], True), ([3.0, 2.5, 2.0], False), ([1.0, 1.2, 1.9], False)])
def test_speed_must_grow_and_reach_what_was_published(flashattention, speeds, holds):
    finding = flashattention.growing_speed([512, 1024, 2048], [Quartiles(x, x, x) for x in speeds])
    assert finding.holds is holds
