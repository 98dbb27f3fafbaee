"""A program that test_ahead_of_time.py runs: compiles products of matrices and prints what they take as JSON."""

import json

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from onchip.ops._triton import Launch
from onchip.testing.ahead_of_time import compile_for, exceeded


@triton.jit
def matmul(a, b, c, k, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    tl.static_assert(M >= 16)
    row, column = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, k, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        left = tl.load(a + row * k + inner[None, :])
        right = tl.load(b + inner[:, None] * N + column)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(c + row * N + column, total.to(c.dtype.element_ty))


def launch(m=64, n=64, block_k=32, stages=2, dtype=torch.float16, offset=0):
    a, b, c = (torch.empty(size + 64, dtype=dtype, device="meta")[offset:] for size in (m * 4096, 4096 * n, m * n))
    return Launch(matmul, (1,), (a, b, c, 4096, m, n, block_k, "ieee"), stages=stages)


def report(case, architecture):
    taken = compile_for(case, architecture)
    return taken._asdict() | {"exceeded": exceeded(taken, architecture)}


small = launch()
found = {architecture: report(small, architecture) for architecture in ("sm_80", "sm_90", "sm_100", "gfx942")}
for architecture in ("sm_80", "sm_90"):
    found[f"{architecture} spills"] = report(launch(m=128, n=256, block_k=64), architecture)
found["gfx942 spills"] = report(launch(m=256, n=256, block_k=64), "gfx942")
found["sm_80 shared"] = report(launch(m=64, n=128, block_k=256, stages=3), "sm_80")
found["sm_90 float32"] = report(launch(dtype=torch.float32), "sm_90")
found["sm_80 offset 8"] = report(launch(offset=8), "sm_80")
found["sm_80 offset 1"] = report(launch(offset=1), "sm_80")

ours = object()
driver.set_active(ours)
compile_for(small, "sm_80")
found["restored"] = driver.active is ours
try:
    compile_for(launch(m=8), "sm_80")
except triton.CompilationError:
    found["restored after an error"] = driver.active is ours
print("\n" + json.dumps(found))
