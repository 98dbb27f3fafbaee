"""State space duality, 8 heads of 64 with a state of 128, against plain PyTorch and transformers' Mamba-2.

The plain contender is the published algorithm as products over all heads and chunks at once, in chunks of 64, which is
its best on a CPU. transformers' takes 256 by default.
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor

import onchip
from onchip.bench.operation_case import OperationCase
from onchip.bench.operations import Contender, Contest, both_passes

SUITES = ("forward", "backward")
LENGTHS = (512, 2048, 8192)
HEADS, DIM, STATE, CHUNK = 8, 64, 128, 64
NAMES = ("x", "dt", "A", "B", "C")


def cases(suites: Sequence[str], *, dtypes: Sequence[str], lengths: Sequence[int], quick: bool) -> list[OperationCase]:
    """Each suite in float32, unless asked otherwise; `backward` is both passes.

    >>> [case.label for case in cases(["forward"], dtypes=[], lengths=[512], quick=False)]
    ['float32 T 512 H 8 P 64 N 128 forward']
    """
    per_step = 2.0 * HEADS * (2 * DIM * STATE + CHUNK // 2 * DIM)
    return [
        OperationCase(
            "ssd",
            suite,
            dtype,
            (("T", length), ("H", HEADS), ("P", DIM), ("N", STATE)),
            grad=suite == "backward",
            operations=per_step * length * (3.5 if suite == "backward" else 1),
        )
        for suite in suites
        for dtype in dtypes or ("float32",)
        for length in lengths or (LENGTHS[:1] if quick else LENGTHS)
    ]


def contest(case: OperationCase) -> Contest:
    """onchip, plain PyTorch, and transformers where it is installed."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    rows = (1, case["T"])
    x, B, C, grad = (
        torch.randn(*rows, *shape, generator=generator).to(dtype)
        for shape in ((case["H"], case["P"]), (1, case["N"]), (1, case["N"]), (case["H"], case["P"]))
    )
    dt = 0.1 * torch.rand(*rows, case["H"], generator=generator)
    A = -8 * torch.rand(case["H"], generator=generator)

    def leaves(dtype: torch.dtype | None = None) -> list[Tensor]:
        return [t.detach().to(dtype or t.dtype).requires_grad_(case.grad) for t in (x, dt, A, B, C)]

    contenders = {
        "onchip": Contender(both_passes(onchip.ssd, leaves(), grad)),
        "eager": Contender(both_passes(_batched, leaves(), grad)),
    }
    if find_spec("transformers"):
        contenders["transformers"] = Contender(both_passes(_transformers, leaves(), grad.float()))
    truth = both_passes(_exactly, leaves(torch.float64), grad.double())
    crossing = 2 * x.nbytes + dt.nbytes + B.nbytes + C.nbytes
    return Contest(
        contenders,
        truth=lambda: tuple(t.detach() for t in truth()),
        names=("out", *(f"grad {name}" for name in NAMES)) if case.grad else ("out",),
        nbytes=(3 if case.grad else 1) * crossing,
        served_by=str(onchip.explain(onchip.ssd, x, dt, A, B, C).chosen),
    )


def _exactly(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return onchip.ssd(x, dt, A, B, C, backend="reference")


def _transformers(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    module = import_module("transformers.models.mamba2.modeling_mamba2")
    return cast(Tensor, module.mamba2_chunk_scan(x, dt, A, B, C, chunk_size=256))


def _batched(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Chunks that divide the length are taken all at once: (B, chunks, H, time, …)."""
    chunk = next(size for size in range(min(CHUNK, x.shape[1]), 0, -1) if x.shape[1] % size == 0)

    def in_chunks(t: Tensor) -> Tensor:
        return cast(Tensor, t.unflatten(1, (-1, chunk))).transpose(2, 3)  # type: ignore[no-untyped-call]

    wide = torch.promote_types(x.dtype, torch.float32)
    b, c = (in_chunks(t.to(wide).repeat_interleave(x.shape[2] // t.shape[2], 2)) for t in (B, C))
    u, log = in_chunks(x.to(wide) * dt[..., None]), in_chunks(dt * A)
    sums = log.cumsum(-1)
    hidden = torch.ones(chunk, chunk, dtype=torch.bool).triu(1)
    decay = (sums[..., :, None] - sums[..., None, :]).masked_fill(hidden, -torch.inf).exp()
    added = (u * decay[..., -1, :, None]).transpose(-1, -2) @ b
    whole = sums[..., -1, None, None].exp()
    states = [torch.zeros_like(added[:, 0])]
    for i in range(added.shape[1] - 1):
        states.append(states[-1] * whole[:, i] + added[:, i])
    y = (c @ b.transpose(-1, -2) * decay) @ u + sums[..., None].exp() * (c @ torch.stack(states, 1).transpose(-1, -2))
    return y.transpose(2, 3).flatten(1, 2).to(x.dtype)
