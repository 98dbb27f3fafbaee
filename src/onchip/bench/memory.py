"""How much memory a call needs beyond its inputs and outputs: measured in a process of its own."""

import contextlib
import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from onchip.bench import machine
from onchip.bench.cases import Case

if TYPE_CHECKING:
    import torch


def extra_in_subprocess(case: Case, name: str, device: "torch.device") -> float:
    """Peak memory of one call beyond inputs and outputs, as a fraction of them.

    Raises:
        RuntimeError: the process failed.
    """
    probe = [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(case)), name, str(device)]
    # A fixed threshold makes every large block a mapping of its own, gone when freed: nothing is reused unseen.
    environment = machine.environment("default") | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(probe, capture_output=True, text=True, check=False, env=environment)
    if run.returncode != 0:
        raise RuntimeError(f"measuring the memory of {name}: {(run.stderr.strip() or 'killed').splitlines()[-1]}")
    return float(run.stdout)


def extra(case: Case, name: str, device: "torch.device") -> float:
    """The same, in this process, which should have done nothing else before."""
    from onchip.bench.attention import contender, small

    contender(name, small(case), device).results()  # loads libraries, starts threads
    runner = contender(name, case, device)
    with runner.scope():
        start = _restart_peak(device)
        results = runner.call()
        peak = _peak(device)
    outputs = sum(x.nbytes for x in results)
    return (peak - start - outputs) / (runner.inputs.nbytes + outputs)


def _restart_peak(device: "torch.device") -> int:
    """Bytes in use now, from where the peak is counted."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # elsewhere than on Linux the peak of the whole process has to do
            Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: "torch.device") -> int:
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte


if __name__ == "__main__":
    import torch

    case_json, contender_name, where = sys.argv[1:]
    print(extra(Case(**json.loads(case_json)), contender_name, torch.device(where)))
