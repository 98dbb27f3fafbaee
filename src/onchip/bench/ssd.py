"""State space duality against plain PyTorch, transformers' Mamba-2, mamba_ssm and fla: heads of 64, a state of 128.

The plain contender is the published algorithm as products over all heads and chunks at once, in chunks of 64, which is
its best on a CPU. transformers' takes 256 by default, and on a GPU more memory than there is. fla has the same
operation as linear attention with one gate for each head.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor

import onchip
from onchip.bench.cases import Device
from onchip.bench.operation_case import OperationCase, sizes_of
from onchip.bench.operations import CPU, Contender, Contest, both_passes, optional

SUITES = ("forward", "backward", "step")
LENGTHS: dict[Device, tuple[int, ...]] = {"cpu": (512, 2048, 8192), "cuda": (2048, 16384)}
HEADS: dict[Device, int] = {"cpu": 8, "cuda": 32}
DTYPES: dict[Device, str] = {"cpu": "float32", "cuda": "bfloat16"}
DIM, STATE, CHUNK = 64, 128, 64
NAMES = ("x", "dt", "A", "B", "C")


def cases(
    suites: Sequence[str], *, dtypes: Sequence[str], lengths: Sequence[int], quick: bool, device: Device = "cpu"
) -> list[OperationCase]:
    """Each suite in float32, on a GPU in bfloat16, unless asked otherwise; `backward` is both passes.

    >>> [case.label for case in cases(["forward"], dtypes=[], lengths=[512], quick=False)]
    ['float32 T 512 H 8 P 64 N 128 forward']
    """
    return [
        OperationCase(
            "ssd",
            suite,
            dtype,
            (*sizes, ("H", HEADS[device]), ("P", DIM), ("N", STATE)),
            grad=suite == "backward",
            operations=_operations(suite, **dict(sizes)) * HEADS[device],
        )
        for suite in suites
        for dtype in dtypes or (DTYPES[device],)
        for sizes in sizes_of(suite, lengths or LENGTHS[device][: 1 if quick else None], device)
    ]


def _operations(suite: str, B: int = 1, T: int = 1) -> float:
    """Of a head, without C Bᵀ, which heads share: the state in and out and, not in a step, half of a chunk's square."""
    a_token = 4.0 * DIM * STATE + (0 if suite == "step" else CHUNK * DIM)
    return a_token * B * T * (3.5 if suite == "backward" else 1)


def contest(case: OperationCase, device: torch.device = CPU) -> Contest:
    """onchip, plain PyTorch, transformers where it is installed, and the packages of kernels there are."""
    generator = torch.Generator(device).manual_seed(0)
    rows, heads = (case.batch,) if case.suite == "step" else (case.batch, case["T"]), case["H"]

    def random(*shape: int, normal: bool = True) -> Tensor:
        draw = torch.randn if normal else torch.rand
        return draw(shape, generator=generator, device=device)

    x, B, C = (
        random(*rows, *shape).to(getattr(torch, case.dtype))
        for shape in ((heads, case["P"]), (1, case["N"]), (1, case["N"]))
    )
    inputs = (x, 0.1 * random(*rows, heads, normal=False), -8 * random(heads, normal=False), B, C)
    if case.suite == "step":
        return _step(inputs, random(case.batch, heads, case["P"], case["N"]))
    return _passes(case, inputs, random(*rows, heads, case["P"]).to(x.dtype))


def _passes(case: OperationCase, inputs: Sequence[Tensor], grad: Tensor) -> Contest:
    def contender(run: Callable[..., Tensor]) -> Contender:
        leaves = [t.detach().requires_grad_(case.grad) for t in inputs]
        return Contender(both_passes(run, leaves, grad))

    contenders = {"onchip": contender(onchip.ssd), "eager": contender(_batched)}
    if not grad.is_cuda and find_spec("transformers"):
        contenders["transformers"] = contender(_transformers)
    contenders |= optional("mamba_ssm", lambda: contender(_mamba_ssm)) | optional("fla", lambda: contender(_fla))
    truth = both_passes(_exactly, [t.double().requires_grad_(case.grad) for t in inputs], grad.double())
    return Contest(
        contenders,
        truth=lambda: tuple(t.detach() for t in truth()),
        names=("out", *(f"grad {name}" for name in NAMES)) if case.grad else ("out",),
        served_by=str(onchip.explain(onchip.ssd, *inputs).chosen),
        ceiling="mm",
    )


def _step(inputs: Sequence[Tensor], state: Tensor) -> Contest:
    """One token of each sequence; the state, (B, H, P, N), is read and written."""
    x, dt, A, B, C = inputs

    def contender(run: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Contender:
        own = state.clone()
        return Contender(lambda: run(own))

    def mamba_ssm(state: Tensor) -> tuple[Tensor, Tensor]:
        """One decay for each head: views without strides over its channels."""
        update = import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
        decays, steps = A[:, None, None].expand(state.shape[1:]), dt[:, :, None].expand(x.shape)
        dt_bias = torch.zeros_like(A)[:, None].expand(x.shape[1:])
        return update(state, x, steps, decays, B, C, dt_bias=dt_bias), state

    return Contest(
        {
            "onchip": contender(lambda state: onchip.ssd_step(x, state, dt, A, B, C, out_state=state)),
            "eager": contender(lambda state: onchip.ssd_step(x, state, dt, A, B, C, backend="reference")),
            **optional("mamba_ssm", lambda: contender(mamba_ssm)),
        },
        truth=lambda: _exact_step(*(t.double() for t in (x, state, dt, A, B, C))),
        names=("out", "state"),
        nbytes=2 * state.nbytes,
        served_by=str(onchip.explain(onchip.ssd_step, x, state, dt, A, B, C).chosen),
    )


def _exact_step(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    return onchip.ssd_step(*tensors, backend="reference")


def _exactly(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return onchip.ssd(x, dt, A, B, C, backend="reference")


def _transformers(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    module = import_module("transformers.models.mamba2.modeling_mamba2")
    return cast(Tensor, module.mamba2_chunk_scan(x, dt, A, B, C, chunk_size=256)).to(x.dtype)


def _mamba_ssm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    scan = import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    return cast(Tensor, scan(x, dt, A, B, C, chunk_size=256))


def _fla(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Keys and queries of its own for each head."""
    keys, queries = (t.expand(-1, -1, x.shape[2], -1) for t in (B, C))
    values = x * dt[..., None].to(x.dtype)
    out, _ = import_module("fla.ops.simple_gla").chunk_simple_gla(queries, keys, values, g=dt * A, scale=1.0)
    return cast(Tensor, out)


def _batched(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Chunks that divide the length are taken all at once: (B, chunks, H, time, …)."""
    chunk = next(size for size in range(min(CHUNK, x.shape[1]), 0, -1) if x.shape[1] % size == 0)

    def in_chunks(t: Tensor) -> Tensor:
        return cast(Tensor, t.unflatten(1, (-1, chunk))).transpose(2, 3)  # type: ignore[no-untyped-call]

    wide = torch.promote_types(x.dtype, torch.float32)
    b, c = (in_chunks(t.to(wide).repeat_interleave(x.shape[2] // t.shape[2], 2)) for t in (B, C))
    u, log = in_chunks(x.to(wide) * dt[..., None]), in_chunks(dt * A)
    sums = log.cumsum(-1)
    hidden = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    decay = (sums[..., :, None] - sums[..., None, :]).masked_fill(hidden, -torch.inf).exp()
    added = (u * decay[..., -1, :, None]).transpose(-1, -2) @ b
    whole = sums[..., -1, None, None].exp()
    states = [torch.zeros_like(added[:, 0])]
    for i in range(added.shape[1] - 1):
        states.append(states[-1] * whole[:, i] + added[:, i])
    y = (c @ b.transpose(-1, -2) * decay) @ u + sums[..., None].exp() * (c @ torch.stack(states, 1).transpose(-1, -2))
    return y.transpose(2, 3).flatten(1, 2).to(x.dtype)
