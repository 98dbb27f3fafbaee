"""What a measurement was made on, and the environment it is made in."""

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import onchip

Malloc = Literal["default", "tuned"]

# Touching a fresh page costs microseconds on a virtual machine, and glibc hands big blocks back to the system after
# every call. Tuned, it keeps them: the arithmetic shows, for every implementation alike.
TUNED_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "500000000",
}


def environment(malloc: Malloc, inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment to measure in. It takes effect only in a process that starts with it.

    >>> environment("default", {"PATH": "/bin", "MALLOC_TOP_PAD_": "1"})
    {'PATH': '/bin', 'OMP_WAIT_POLICY': 'passive'}
    """
    kept = {name: value for name, value in inherited.items() if name not in TUNED_MALLOC}
    return kept | {"OMP_WAIT_POLICY": "passive"} | (TUNED_MALLOC if malloc == "tuned" else {})


@dataclass(frozen=True)
class Machine:
    """One machine, in one setting."""

    name: str
    cores: int
    capability: str
    threads: int
    malloc: Malloc
    python: str
    torch: str
    onchip: str
    commit: str | None
    triton: str | None = None
    cuda: str | None = None
    driver: str | None = None

    @property
    def gpu(self) -> bool:
        """Whether it is one; a CPU has cores."""
        return self.cores == 0

    @property
    def slug(self) -> str:
        """A folder's name for results from this kind of machine."""
        words = self.name if self.gpu else f"{self.name} {self.cores} core {self.capability}"
        return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(device: str, malloc: Malloc) -> Machine:
    """This machine, as it is set now."""
    import torch

    on_gpu = device != "cpu"
    return Machine(
        name=torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        cores=0 if on_gpu else cores(),
        capability="sm_{}{}".format(*torch.cuda.get_device_capability())
        if on_gpu
        else torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        malloc=malloc,
        python=platform.python_version(),
        torch=torch.__version__,
        onchip=onchip.__version__,
        commit=_commit(),
        **(_gpu_versions() if on_gpu else {}),
    )


def _cpu_name() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return found[1] if found else platform.machine()


def _gpu_versions() -> dict[str, str | None]:
    import torch

    triton = version("triton") if find_spec("triton") else None
    driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {"triton": triton, "cuda": torch.version.cuda, "driver": driver and driver.splitlines()[0]}


def _commit() -> str | None:
    """The commit of the source tree onchip runs from, + where files differ from it.

    Where there is no git, ONCHIP_COMMIT may say which it is; else None.
    """
    described = _output_of("git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+")
    return described or os.environ.get("ONCHIP_COMMIT") or None


def _output_of(*command: str) -> str | None:
    """What a command prints; None where it is missing, fails or prints nothing."""
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 and run.stdout.strip() else None
