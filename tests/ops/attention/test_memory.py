"""Never a T×T array: what a call needs beyond its inputs and outputs, and of what it is served by."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from onchip.ops import _native

pytestmark = [
    pytest.mark.skipif(_native.missing is not None, reason="of the kernels"),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is counted by Linux"),
]

LENGTH, HEADS, DIM = 8192, 8, 64

# `setting` makes the call's arguments; printed are the bytes that each pass needs on top, and of inputs and outputs.
MEASURE = """
import torch, onchip
from pathlib import Path

def resident(line):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(line))

def measured(function):
    Path("/proc/self/clear_refs").write_text("5")  # restarts the peak
    start = resident("VmRSS")
    results = function()
    return results, resident("VmHWM") - start

def tensors(length):
    q, k, v, arguments = setting(length)
    leaves = [x for x in (q, k, v, *arguments.values()) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return q, k, v, arguments, [x.requires_grad_() for x in leaves], torch.randn_like(q)

def passes(q, k, v, arguments, leaves, weight):
    outputs, extra = measured(lambda: onchip.attention_with_lse(q, k, v, **arguments))
    forward = extra - size(outputs), size(leaves) + size(outputs)
    grads, extra = measured(lambda: torch.autograd.grad(outputs[0], leaves, weight))
    return *forward, extra - size(grads), 2 * size(leaves) + size(outputs) + weight.nbytes

def size(tensors):
    return sum(x.nbytes for x in tensors)

passes(*tensors(64))  # loads and starts whatever is loaded and started once
print(*passes(*tensors({length})))
"""

SETTINGS = {
    "causal": """
    q, k, v = torch.randn(3, 1, n, {H}, {D}).unbind(0)
    arguments = dict(causal=True, window=(1500, None))""",
    "everything": """
    q, k, v = torch.randn(3, 1, n, {H}, {D}).unbind(0)
    score = dict(bias=torch.randn({H}, 1, n), alibi_slopes=torch.rand({H}) / 100, sinks=torch.randn({H}))
    arguments = dict(window=(400, 0), softcap=20.0, **score)""",
    "packed in 16 bits": """
    q, k, v = (torch.randn(n, {H}, {D}).bfloat16() for _ in range(3))
    arguments = dict(window=(300, 100), cu_seqlens_q=torch.tensor([0, n // 3, n]))""",
}


def in_a_fresh_process(code: str) -> str:
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed blocks go back to the system
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_twentieth_of_inputs_and_outputs_on_top(setting):
    code = f"def setting(n):\n    {setting.format(H=HEADS, D=DIM).strip()}\n    return q, k, v, arguments\n"
    printed = in_a_fresh_process(code + MEASURE.replace("{length}", str(LENGTH)))
    forward, forward_needs, backward, backward_needs = map(int, printed.split())
    assert forward_needs > 3 * LENGTH * HEADS * DIM * 2
    assert forward <= 0.05 * forward_needs
    assert backward <= 0.05 * backward_needs


RUNTIMES = """
import re, torch, onchip
torch.set_num_threads(1)
q = torch.randn(1, 500, 8, 64)
onchip.attention(q, q, q)
maps = open("/proc/self/maps").read()
print(*{path.rsplit("/")[-1] for path in re.findall(r"\\S*lib[gi]?omp\\S*", maps)})
"""


def test_one_openmp_runtime_is_mapped():
    """Two would each start their own threads, and `torch.set_num_threads` would speak to one of them."""
    assert len(in_a_fresh_process(RUNTIMES).split()) == 1


THREADS = """
import os, torch, onchip
q = torch.randn(1, 500, 8, 64)
for n in (1, 2):
    torch.set_num_threads(n)
    before = len(os.listdir("/proc/self/task"))
    onchip.attention(q, q, q)
    print(len(os.listdir("/proc/self/task")) - before)
"""


def test_as_many_threads_as_torch_is_told():
    assert in_a_fresh_process("import os; os.environ['OMP_NUM_THREADS'] = '1'\n" + THREADS).split() == ["0", "1"]
