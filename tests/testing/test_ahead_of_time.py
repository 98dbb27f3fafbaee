"""What a kernel takes is read off rightly, by the assembler's own account; kernels that take too much show."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from onchip.ops import _triton
from onchip.ops._triton import Launch
from onchip.testing.ahead_of_time import compile_for

TOYS = Path(__file__).with_name("toys.py")
NVIDIA = ("sm_80", "sm_90", "sm_100")
ALL = (*NVIDIA, "gfx942")

compiles = pytest.mark.skipif(_triton.missing is not None, reason=str(_triton.missing))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The process that compiles the toys, from an empty cache, the assembler's messages before the last line."""
    cache = tmp_path_factory.mktemp("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_DUMP_PTXAS_LOG": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "error", str(TOYS)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def toys(run):
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@compiles
@pytest.mark.parametrize("architecture", ALL)
def test_a_small_kernel_takes_little_and_multiplies_on_the_matrix_units(toys, architecture):
    kernel = toys[architecture]
    assert kernel["spills"] == 0
    assert kernel["exceeded"] == []
    assert kernel["tensor_core"] > 0
    assert kernel["warps"] == 4
    assert 16 < kernel["registers"] <= 128


@compiles
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
def test_a_kernel_that_spills_is_seen_to(toys, architecture):
    assert toys[f"{architecture} spills"]["spills"] > 0


@compiles
def test_registers_and_spills_are_those_of_the_assembler(run, toys):
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", run.stdout)]
    spills = [int(a) + int(b) for a, b in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stdout)]
    compiled = [kernel for name, kernel in toys.items() if name.startswith("sm_") and name != "sm_80 offset 8"]
    assert registers == [kernel["registers"] for kernel in compiled]
    assert spills == [kernel["spills"] for kernel in compiled]


@compiles
def test_too_much_shared_memory_is_reported(toys):
    (phrase,) = toys["sm_80 shared"]["exceeded"]
    assert phrase == f"shared is {toys['sm_80 shared']['shared']}, and sm_80 has 166912"


@compiles
def test_a_kernel_off_the_matrix_units_is_seen(toys):
    assert toys["sm_90 float32"]["tensor_core"] == 0


@compiles
def test_products_waited_for_one_by_one_are_seen(toys):
    assert toys["sm_90"]["waits"] <= toys["sm_90"]["tensor_core"]
    assert toys["sm_90 spills"]["waits"] == toys["sm_90 spills"]["tensor_core"] > 2


@compiles
def test_tensors_without_elements_are_as_aligned_as_those_with(toys):
    assert toys["sm_80 offset 8"] == toys["sm_80"]  # 16 bytes
    assert toys["sm_80 offset 1"] != toys["sm_80"]


@compiles
def test_the_driver_is_put_back(toys):
    assert toys["restored"]
    assert toys["restored after an error"]


def test_errors():
    with pytest.raises(ValueError, match=r"architecture must be one of sm_80, sm_90, sm_100, gfx942, got 'sm_70'"):
        compile_for(Launch(None, (1,), ()), "sm_70")
    with pytest.raises(TypeError, match=r"TRITON_INTERPRET unset, got a function"):
        compile_for(Launch(lambda: None, (1,), ()), "sm_80")
