"""What each kernel may take of each architecture: a file of figures, and how a kernel is held to them.

`python -m onchip.testing.budgets FILE` measures the kernels of `onchip.testing.specimens` and writes the file
(`make budgets`). It is read by people as a diff: what a change to a kernel costs.
"""

import multiprocessing
import os
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from onchip._files import atomic_write
from onchip.ops._triton import Launch
from onchip.testing.ahead_of_time import LIMITS, Resources, compile_for, exceeded
from onchip.testing.specimens import SPECIMENS

REGISTERS = 8
"""How many registers more than its budget a kernel may take: they are allotted to threads in eights."""

ANY_COMPILER = 2 * 4 * 255
"""How many bytes more than its budget a kernel may spill under another Triton: all registers, out and back, once."""

_HEADER = """\
# What each kernel may take of each architecture; `make budgets` writes this file, tests/test_budgets.py reads it.
"""


class Case(NamedTuple):
    """A kernel of a specimen, on an architecture; `str()` is its name in tests."""

    architecture: str
    kernel: str

    def __str__(self) -> str:
        return f"{self.architecture}: {self.kernel}"


class Budget(NamedTuple):
    """What the kernels took, compiled by one version of Triton."""

    triton: str
    kernels: dict[Case, Resources]


def read(path: Path) -> Budget:
    """The budget in a file that `write` wrote."""
    tables = tomllib.loads(path.read_text())
    kernels = {
        Case(architecture, kernel): Resources(**figures)
        for architecture in LIMITS
        for kernel, figures in tables.get(architecture, {}).items()
    }
    return Budget(tables["triton"], kernels)


def write(path: Path, budget: Budget) -> None:
    """One line a kernel, sorted, so that a difference between two files shows what changed and nothing else."""
    lines = [_HEADER, f'triton = "{budget.triton}"']
    for architecture in LIMITS:
        kernels = sorted((case.kernel, case) for case in budget.kernels if case.architecture == architecture)
        lines += ["", f"[{architecture}]"]
        for kernel, case in kernels:
            figures = ", ".join(f"{name} = {value}" for name, value in budget.kernels[case]._asdict().items())
            lines.append(f'"{kernel}" = {{ {figures} }}')
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def overruns(taken: Resources, allowed: Resources, architecture: str, same_compiler: bool) -> list[str]:
    """How a kernel exceeds its budget or its architecture, one phrase each.

    Another version of the compiler allots registers and shared memory as it sees fit, so it is held to what matters
    under any: that the kernel starts, multiplies on the matrix units, and does not spill without measure.

    >>> allowed = Resources(registers=120, spills=0, shared=1024, tensor_memory=0, tensor_core=16, waits=0, warps=4)
    >>> overruns(allowed._replace(registers=128, spills=8), allowed, "sm_80", same_compiler=True)
    ['spills is 8, and the budget 0']
    >>> overruns(allowed._replace(registers=128, spills=8), allowed, "sm_80", same_compiler=False)
    []
    """
    most = {"spills": allowed.spills + ANY_COMPILER}
    if same_compiler:
        most = {name: getattr(allowed, name) for name in ("spills", "shared", "tensor_memory", "waits")}
        most["registers"] = allowed.registers + REGISTERS
    figures = taken._asdict()
    found = exceeded(taken, architecture)
    found += [f"{name} is {figures[name]}, and the budget {most[name]}" for name in most if figures[name] > most[name]]
    if allowed.tensor_core and not taken.tensor_core:
        found.append(f"no matrix instructions, and the budget has {allowed.tensor_core}")
    return found


def cases() -> list[Case]:
    """All kernels of all specimens, on their architectures. Imports the kernels."""
    return [Case(architecture, kernel) for architecture in LIMITS for kernel in _launches(architecture)]


def measure(case: Case) -> Resources:
    """Compile one kernel and read off what it takes."""
    return compile_for(_launches(case.architecture)[case.kernel], case.architecture)


@cache
def _launches(architecture: str) -> Mapping[str, Launch]:
    """An architecture's launches by "specimen: kernel"; a kernel launched again in a specimen is numbered."""
    named: dict[str, Launch] = {}
    for specimen, (launches, architectures) in SPECIMENS.items():
        seen: Counter[str] = Counter()
        for launch in launches(architecture) if architecture in architectures else ():
            kernel = launch.kernel.__name__.lstrip("_")
            seen[kernel] += 1
            named[f"{specimen}: {kernel}" + (f" {seen[kernel]}" if seen[kernel] > 1 else "")] = launch
    return named


@contextmanager
def compilers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes in which Triton compiles, also where this one interprets: for `cases` and `measure`."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=_compile_here) as pool:
        yield pool


def _compile_here() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _measure_all() -> dict[Case, Resources]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with compilers(os.cpu_count() or 1) as pool, Progress(*columns) as progress:
        waiting = {pool.submit(measure, case): case for case in pool.submit(cases).result()}
        task = progress.add_task("Compiling", total=len(waiting))
        for done in as_completed(waiting):
            if error := done.exception():
                pool.shutdown(wait=False, cancel_futures=True)
                raise RuntimeError(f"{waiting[done]} does not compile") from error
            progress.update(task, advance=1, description=f"Compiled {waiting[done]}")
        return {case: done.result() for done, case in waiting.items()}


def _renew(path: Path) -> None:
    kernels = _measure_all()
    write(path, Budget(version("triton"), kernels))
    print(f"{path}: {len(kernels)} kernels, {sum(taken.spills > 0 for taken in kernels.values())} of them spill")
    for case, taken in kernels.items():
        for phrase in exceeded(taken, case.architecture):
            print(f"{case} cannot start: {phrase}", file=sys.stderr)


if __name__ == "__main__":
    _renew(Path(sys.argv[1]))
