"""The causal convolution, width 4 with SiLU as in Mamba, against PyTorch's depthwise convolution and kernels for GPUs.

Every contender gets its inputs in the layout it likes best: (B, T, D) for onchip and fla, (B, D, T), contiguous, for
PyTorch's conv1d; and for onchip again, as the drop-in gets them. Those of the package causal_conv1d are (B, D, T) over
contiguous channels.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu

import onchip
from onchip.bench.cases import Device
from onchip.bench.operation_case import OperationCase, sizes_of
from onchip.bench.operations import CPU, Contender, Contest, both_passes, optional

SUITES = ("forward", "backward", "step")
LENGTHS: dict[Device, tuple[int, ...]] = {"cpu": (512, 2048, 8192), "cuda": (2048, 16384)}
CHANNELS: dict[Device, int] = {"cpu": 1024, "cuda": 4096}
DTYPES: dict[Device, tuple[str, ...]] = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
WIDTH = 4


def cases(
    suites: Sequence[str], *, dtypes: Sequence[str], lengths: Sequence[int], quick: bool, device: Device = "cpu"
) -> list[OperationCase]:
    """Each suite in float32 and bfloat16, on a GPU in bfloat16; `backward` is both passes.

    >>> [case.label for case in cases(["forward"], dtypes=["float32"], lengths=[512], quick=False)]
    ['float32 T 512 D 1024 W 4 forward']
    """
    return [
        OperationCase(
            "causal_conv1d",
            suite,
            dtype,
            (*sizes, ("D", CHANNELS[device]), ("W", WIDTH)),
            grad=suite == "backward",
            operations=2.0 * WIDTH * dict(sizes).get("T", 1) * CHANNELS[device] * (3 if suite == "backward" else 1),
        )
        for suite in suites
        for dtype in dtypes or DTYPES[device]
        for sizes in sizes_of(suite, lengths or LENGTHS[device][: 1 if quick else None], device)
    ]


def contest(case: OperationCase, device: torch.device = CPU) -> Contest:
    """onchip over contiguous channels and over contiguous time, PyTorch's conv1d, and the packages there are."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(getattr(torch, case.dtype))

    weight, bias = normal(case["D"], case["W"]) / 2, normal(case["D"])
    return _step(case, normal, weight, bias) if case.suite == "step" else _passes(case, normal, weight, bias)


def _passes(case: OperationCase, normal: Callable[..., Tensor], weight: Tensor, bias: Tensor) -> Contest:
    x, grad = (normal(case.batch, case["T"], case["D"]) for _ in range(2))

    def contender(
        run: Callable[..., Tensor], layout: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor] = _same
    ) -> Contender:
        leaves = [t.detach().requires_grad_(case.grad) for t in (layout(x), weight, bias)]
        return Contender(
            both_passes(run, leaves, layout(grad)),
            lambda results: tuple(back(t) if t.ndim == 3 else t for t in results),
        )

    leaves = [t.double().requires_grad_(case.grad) for t in (x, weight, bias)]
    truth = both_passes(_exactly, leaves, grad.double())
    passes = 5 if case.grad else 2  # x and y; then x, the gradients of y and of x
    return Contest(
        {
            "onchip": contender(_ours, _same),
            "conv1d": contender(_theirs, _time_inside, _turned),
            "onchip (B, D, T)": contender(_ours, lambda t: _turned(_time_inside(t))),
            **optional("causal_conv1d", lambda: contender(_package, _turned, _turned)),
            **optional("fla", lambda: contender(_fla, _same)),
        },
        truth=lambda: tuple(t.detach() for t in truth()),
        names=("out", "grad x", "grad weight", "grad bias") if case.grad else ("out",),
        nbytes=passes * x.nbytes,
        served_by=str(onchip.explain(onchip.causal_conv1d, x, weight).chosen),
    )


def _step(case: OperationCase, normal: Callable[..., Tensor], weight: Tensor, bias: Tensor) -> Contest:
    """One token of each sequence; the state, (B, W - 1, D), is read and written."""
    x, state = normal(case.batch, case["D"]), normal(case.batch, case["W"] - 1, case["D"])

    def contender(run: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Contender:
        own = state.clone()
        return Contender(lambda: run(own))

    def ours(state: Tensor) -> tuple[Tensor, Tensor]:
        return onchip.causal_conv1d_step(x, state, weight, bias, activation="silu", out_state=state)

    def eager(state: Tensor) -> tuple[Tensor, Tensor]:
        return onchip.causal_conv1d_step(x, state, weight, bias, activation="silu", backend="reference")

    def package() -> Contender:
        own = _time_inside(state)
        update = import_module("causal_conv1d").causal_conv1d_update
        return Contender(lambda: (update(x, own, weight, bias, activation="silu"), _turned(own)))

    exact = [t.double() for t in (x, state, weight, bias)]
    return Contest(
        {"onchip": contender(ours), "eager": contender(eager), **optional("causal_conv1d", package)},
        truth=lambda: onchip.causal_conv1d_step(*exact, activation="silu", backend="reference"),
        names=("out", "state"),
        nbytes=2 * state.nbytes,
        served_by=str(onchip.explain(onchip.causal_conv1d_step, x, state, weight).chosen),
    )


def _ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return onchip.causal_conv1d(x, weight, bias, activation="silu")


def _exactly(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return onchip.causal_conv1d(x, weight, bias, activation="silu", backend="reference")


def _theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
    return silu(out[..., : x.shape[2]])


def _package(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return cast(Tensor, import_module("causal_conv1d").causal_conv1d_fn(x, weight, bias, activation="silu"))


def _fla(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out, _ = import_module("fla.modules.convolution").causal_conv1d(x, weight, bias, activation="silu")
    return cast(Tensor, out)


def _same(x: Tensor) -> Tensor:
    return x


def _turned(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _time_inside(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()
