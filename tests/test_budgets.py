"""Kernels take no more of a GPU than tests/budgets.toml allows: compiled here for GPUs that are not there.

Under the version of Triton that the file was made with, a kernel may take 8 registers more, because they are allotted
in eights, and nothing else. Another version's compiler allots them as it sees fit: there a kernel must start, multiply
on the matrix units, and spill at most one register file more, out and back. Where a change is meant, `make budgets`
writes the file again, and the diff shows the cost.
"""

from importlib.metadata import version
from pathlib import Path

import pytest

from onchip.ops import _triton
from onchip.testing import budgets
from onchip.testing.ahead_of_time import Resources
from onchip.testing.budgets import Budget, Case, overruns

FILE = Path(__file__).with_name("budgets.toml")
BUDGET = budgets.read(FILE)

compiles = pytest.mark.skipif(_triton.missing is not None, reason=str(_triton.missing))


@pytest.fixture(scope="module")
def compiler():
    with budgets.compilers(1) as pool:
        yield pool


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("case", BUDGET.kernels, ids=str)
def test_kernel_keeps_to_its_budget(case, compiler):
    taken = compiler.submit(budgets.measure, case).result()
    same_compiler = version("triton") == BUDGET.triton
    assert overruns(taken, BUDGET.kernels[case], case.architecture, same_compiler) == []


@compiles
def test_every_kernel_has_a_budget(compiler):
    assert set(compiler.submit(budgets.cases).result()) == set(BUDGET.kernels), "`make budgets` writes the file again"


ALLOWED = Resources(registers=120, spills=16, shared=160_000, tensor_memory=0, tensor_core=16, waits=3, warps=4)


@pytest.mark.parametrize(
    "change, same_compiler, other_compiler",
    [
        ({}, True, True),
        ({"registers": 128}, True, True),
        ({"registers": 129}, False, True),
        ({"spills": 20}, False, True),
        ({"spills": 16 + 2 * 4 * 255 + 4}, False, False),
        ({"shared": 160_016}, False, True),
        ({"shared": 170_000}, False, False),
        ({"tensor_memory": 16}, False, False),
        ({"tensor_core": 8}, True, True),
        ({"tensor_core": 0}, False, False),
        ({"waits": 16}, False, True),
    ],
)
def test_what_a_kernel_may_take(change, same_compiler, other_compiler):
    taken = ALLOWED._replace(**change)
    assert (overruns(taken, ALLOWED, "sm_80", same_compiler=True) == []) == same_compiler
    assert (overruns(taken, ALLOWED, "sm_80", same_compiler=False) == []) == other_compiler


def test_a_budget_too_large_for_the_architecture_is_no_excuse():
    assert overruns(ALLOWED, ALLOWED, "gfx942", same_compiler=True) == ["shared is 160000, and gfx942 has 65536"]


def test_file_is_read_as_it_was_written(tmp_path):
    budget = Budget("3.9.0", {Case("sm_90", "b"): ALLOWED, Case("sm_80", "a: x 2"): ALLOWED._replace(registers=1)})
    budgets.write(tmp_path / "one.toml", budget)
    assert budgets.read(tmp_path / "one.toml") == budget
    budgets.write(tmp_path / "two.toml", Budget("3.9.0", dict(reversed(budget.kernels.items()))))
    assert (tmp_path / "two.toml").read_text() == (tmp_path / "one.toml").read_text()
