"""Mamba's selective scan, with its softplus, D and gate, against plain PyTorch, mambapy and mamba_ssm.

On a CPU the plain one is transformers' loop, which is only measured forward: its backward pass writes the whole input's
gradient anew at every token, and takes minutes. Both passes are measured against mambapy's parallel scan where it is
installed (`pip install 'onchip[bench]'`), else against the reference, which is the plain one on a GPU, too. mambapy and
mamba_ssm get what the operation gets: x, dt, z, A, B, C, D and the bias.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

import onchip
from onchip.bench.cases import Device
from onchip.bench.operation_case import OperationCase, sizes_of
from onchip.bench.operations import CPU, Contender, Contest, both_passes, optional

SUITES = ("forward", "backward", "step")
LENGTHS: dict[Device, tuple[int, ...]] = {"cpu": (512, 2048), "cuda": (2048, 16384)}
CHANNELS: dict[Device, int] = {"cpu": 512, "cuda": 1536}  # on a GPU Mamba-130M's
DTYPES: dict[Device, str] = {"cpu": "float32", "cuda": "bfloat16"}
STATES = 16


def cases(
    suites: Sequence[str], *, dtypes: Sequence[str], lengths: Sequence[int], quick: bool, device: Device = "cpu"
) -> list[OperationCase]:
    """Each suite in float32, on a GPU in bfloat16, or in the dtypes asked for; `backward` is both passes.

    >>> [case.label for case in cases(["forward"], dtypes=[], lengths=[512], quick=False)]
    ['float32 T 512 D 512 N 16 forward']
    """
    return [
        OperationCase(
            "selective_scan",
            suite,
            dtype,
            (*sizes, ("D", CHANNELS[device]), ("N", STATES)),
            grad=suite == "backward",
            operations=7.0 * dict(sizes).get("T", 1) * CHANNELS[device] * STATES * (3 if suite == "backward" else 1),
        )
        for suite in suites
        for dtype in dtypes or (DTYPES[device],)
        for sizes in sizes_of(suite, lengths or LENGTHS[device][: 1 if quick else None], device)
    ]


def contest(case: OperationCase, device: torch.device = CPU) -> Contest:
    """onchip, and its peers with the inputs in the layout they like."""
    generator = torch.Generator(device).manual_seed(0)
    channels, states = case["D"], case["N"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    rows = (case.batch,) if case.suite == "step" else (case.batch, case["T"])
    tokens = [normal(*rows, channels) for _ in range(3)]  # x, dt, z
    groups = [normal(*rows, 1, states) for _ in range(2)]
    A = -torch.arange(1.0, states + 1, device=device).repeat(channels, 1)
    parameters = [A, normal(channels), normal(channels) - 4]  # D, and dt_bias about as Mamba's
    inputs = [u.to(getattr(torch, case.dtype)) for u in (*tokens, *groups)] + parameters
    if case.suite == "step":
        return _step(inputs, normal(case.batch, channels, states))
    return _passes(case, inputs, normal(*rows, channels).to(inputs[0].dtype))


def _passes(case: OperationCase, inputs: Sequence[Tensor], grad: Tensor) -> Contest:
    def contender(
        run: Callable[..., Tensor],
        layout: Callable[[Tensor], Tensor] = _same,
        ours: Callable[[Tensor], Tensor] = _same,
    ) -> Contender:
        leaves = [layout(u).detach().contiguous().requires_grad_(case.grad) for u in inputs]
        return Contender(both_passes(run, leaves, layout(grad).contiguous()), lambda results: tuple(map(ours, results)))

    contenders, on_gpu = {"onchip": contender(_ours)}, grad.is_cuda
    if not case.grad and not on_gpu and find_spec("transformers"):
        contenders["transformers"] = _transformers(inputs)
    mambapy = optional("mambapy", lambda: contender(_mambapy))
    if on_gpu or not (mambapy or len(contenders) > 1):
        contenders["eager"] = contender(_reference)
    contenders |= mambapy | optional("mamba_ssm", lambda: contender(_mamba_ssm, _time_last, _time_first))
    truth = both_passes(_reference, [u.double().requires_grad_(case.grad) for u in inputs], grad.double())
    passes = 8 if case.grad else 4  # x, dt, z and y; then they again and the gradients, of which y's is read
    x, dt, _, B, C, A, *_ = inputs
    return Contest(
        contenders,
        truth=lambda: tuple(u.detach() for u in truth()),
        names=("out", *(f"grad {n}" for n in ("x", "dt", "z", "B", "C", "A", "D", "dt_bias") if case.grad)),
        nbytes=passes * grad.nbytes,
        served_by=str(onchip.explain(onchip.selective_scan, x, dt, A, B, C).chosen),
        once=("eager",) if on_gpu else (),
    )


def _step(inputs: Sequence[Tensor], state: Tensor) -> Contest:
    """One token of each sequence; the state, (B, D, N), is read and written."""
    x, dt, z, B, C, A, D, dt_bias = inputs

    def contender(run: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Contender:
        own = state.clone()
        return Contender(lambda: run(own))

    def ours(state: Tensor) -> tuple[Tensor, Tensor]:
        return onchip.selective_scan_step(
            x, state, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=True, out_state=state
        )

    def mamba_ssm(state: Tensor) -> tuple[Tensor, Tensor]:
        update = import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
        return update(state, x, dt, A, B[:, 0], C[:, 0], D=D, z=z, dt_bias=dt_bias, dt_softplus=True), state

    return Contest(
        {
            "onchip": contender(ours),
            "eager": contender(lambda state: _exact_step(state, *inputs)),
            **optional("mamba_ssm", lambda: contender(mamba_ssm)),
        },
        truth=lambda: _exact_step(*(u.double() for u in (state, *inputs))),
        names=("out", "state"),
        nbytes=2 * state.nbytes + A.nbytes,
        served_by=str(onchip.explain(onchip.selective_scan_step, x, state, dt, A, B, C).chosen),
    )


def _exact_step(
    state: Tensor, x: Tensor, dt: Tensor, z: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor]:
    return onchip.selective_scan_step(
        x, state, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=True, backend="reference"
    )


def _ours(x: Tensor, dt: Tensor, z: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    return onchip.selective_scan(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=True)


def _reference(x: Tensor, dt: Tensor, z: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    return onchip.selective_scan(x, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=True, backend="reference")


def _mambapy(x: Tensor, dt: Tensor, z: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """Its Mamba block's own method, which has no use for the block, and what the block does before and after it."""
    scan = import_module("mambapy.mamba").MambaBlock.selective_scan
    y: Tensor = scan(None, x, softplus(dt + dt_bias), A, B[:, :, 0], C[:, :, 0].to(A.dtype), D)
    return (y * silu(z)).to(x.dtype)


def _mamba_ssm(x: Tensor, dt: Tensor, z: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """Its kernel's layout is (B, D, T), and of B and C (B, G, N, T)."""
    scan = import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    return cast(Tensor, scan(x, dt, A, B, C, D=D, z=z, delta_bias=dt_bias, delta_softplus=True))


def _same(u: Tensor) -> Tensor:
    return u


def _time_last(u: Tensor) -> Tensor:
    """(B, T, …) as (B, …, T); parameters stay."""
    return u.movedim(1, -1) if u.ndim > 2 else u


def _time_first(u: Tensor) -> Tensor:
    return u.movedim(-1, 1) if u.ndim > 2 else u


def _transformers(inputs: Sequence[Tensor]) -> Contender:
    """The loop of transformers' Mamba where no package of kernels is installed, over contiguous time."""
    scan = import_module("transformers.models.mamba.modeling_mamba").mamba_selective_scan
    x, dt, z, B, C, A, D, dt_bias = inputs
    turned = [u.transpose(1, 2).contiguous() for u in (x, dt, z, B[:, :, 0], C[:, :, 0])]

    def call() -> tuple[Tensor, ...]:
        x, dt, z, B, C = turned
        with torch.no_grad():
            out = scan(x, dt, A, B, C, D=D, z=z, delta_bias=dt_bias, delta_softplus=True)
        return (out[0] if isinstance(out, tuple) else out,)

    return Contender(call, lambda results: (results[0].transpose(1, 2),))
