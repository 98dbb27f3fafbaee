"""Mamba's selective scan, with its softplus, D and gate, against transformers' loop and mambapy's parallel scan.

transformers' loop is only measured forward: its backward pass writes the whole input's gradient anew at every token,
and takes minutes. Both passes are measured against mambapy (`pip install mambapy`) where that is there, else against
the reference.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

import onchip
from onchip.bench.operation_case import OperationCase
from onchip.bench.operations import Contender, Contest, both_passes

SUITES = ("forward", "backward")
LENGTHS = (512, 2048)
CHANNELS, STATES = 512, 16


def cases(suites: Sequence[str], *, dtypes: Sequence[str], lengths: Sequence[int], quick: bool) -> list[OperationCase]:
    """Each suite in float32, or in the dtypes asked for; `backward` is both passes.

    >>> [case.label for case in cases(["forward"], dtypes=[], lengths=[512], quick=False)]
    ['float32 T 512 D 512 N 16 forward']
    """
    return [
        OperationCase(
            "selective_scan",
            suite,
            dtype,
            (("T", length), ("D", CHANNELS), ("N", STATES)),
            grad=suite == "backward",
            operations=7.0 * length * CHANNELS * STATES * (3 if suite == "backward" else 1),
        )
        for suite in suites
        for dtype in dtypes or ("float32",)
        for length in lengths or (LENGTHS[:1] if quick else LENGTHS)
    ]


def contest(case: OperationCase) -> Contest:
    """onchip, and its peers with the inputs in the layout they like."""
    generator = torch.Generator().manual_seed(0)
    dtype, time, channels, states = getattr(torch, case.dtype), case["T"], case["D"], case["N"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens = [normal(1, time, channels), normal(1, time, channels), normal(1, time, channels)]  # x, dt, z
    groups = [normal(1, time, 1, states), normal(1, time, 1, states)]
    A = -torch.arange(1.0, states + 1).repeat(channels, 1)
    parameters = [A, normal(channels), normal(channels) - 4]  # D, and dt_bias about as Mamba's
    inputs = [u.to(dtype) for u in (*tokens, *groups)] + parameters
    grad = normal(1, time, channels).to(dtype)

    def leaves(inputs: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        return [u.detach().to(dtype or u.dtype).requires_grad_(case.grad) for u in inputs]

    def contender(run: Callable[..., Tensor]) -> Contender:
        return Contender(both_passes(run, leaves(inputs), grad))

    contenders = {"onchip": contender(_ours)}
    if not case.grad:
        contenders["transformers"] = _transformers(inputs)
    if find_spec("mambapy") is not None:
        contenders["mambapy"] = contender(_mambapy)
    if len(contenders) == 1:
        contenders["reference"] = contender(_reference)
    truth = both_passes(_reference, leaves(inputs, torch.float64), grad.double())
    passes = 8 if case.grad else 4  # x, dt, z and y; then they again and the gradients, of which y's is read
    return Contest(
        contenders,
        truth=lambda: tuple(u.detach() for u in truth()),
        names=("out", *(f"grad {n}" for n in ("x", "dt", "z", "B", "C", "A", "D", "dt_bias") if case.grad)),
        nbytes=passes * grad.nbytes,
        served_by=str(onchip.explain(onchip.selective_scan, *inputs[:2], A, *inputs[3:5]).chosen),
    )


def _ours(x: Tensor, dt: Tensor, z: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    return onchip.selective_scan(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=True)


def _reference(x: Tensor, dt: Tensor, z: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    return onchip.selective_scan(x, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=True, backend="reference")


def _mambapy(x: Tensor, dt: Tensor, z: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """The states of all tokens by mambapy's parallel scan, as its Mamba block has it."""
    steps = softplus(dt + dt_bias)
    decays = torch.exp(steps[..., None] * A)
    states = import_module("mambapy.pscan").pscan(decays, (steps * x)[..., None] * B)
    y: Tensor = (states @ C[:, :, 0, :, None]).squeeze(3) + D * x
    return (y * silu(z)).to(x.dtype)


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
