"""The causal convolution, width 4 with SiLU as in Mamba, against PyTorch's depthwise convolution.

Every contender gets its inputs in the layout it likes best: (B, T, D) for onchip, contiguous (B, D, T) for PyTorch's
conv1d, and for onchip again, as the drop-in gets them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu

import onchip
from onchip.bench.operation_case import OperationCase
from onchip.bench.operations import Contender, Contest, both_passes

SUITES = ("forward", "backward")
LENGTHS = (512, 2048, 8192)
WIDTH, CHANNELS = 4, 1024
BYTES = {"float32": 4, "bfloat16": 2}


def cases(suites: Sequence[str], *, dtypes: Sequence[str], lengths: Sequence[int], quick: bool) -> list[OperationCase]:
    """Each suite in float32 and bfloat16; `backward` is both passes.

    >>> [case.label for case in cases(["forward"], dtypes=["float32"], lengths=[512], quick=False)]
    ['float32 T 512 D 1024 W 4 forward']
    """
    return [
        OperationCase(
            "causal_conv1d",
            suite,
            dtype,
            (("T", length), ("D", CHANNELS), ("W", WIDTH)),
            grad=suite == "backward",
            operations=2.0 * WIDTH * length * CHANNELS * (3 if suite == "backward" else 1),
        )
        for suite in suites
        for dtype in dtypes or BYTES
        for length in lengths or (LENGTHS[:1] if quick else LENGTHS)
    ]


def contest(case: OperationCase) -> Contest:
    """onchip over contiguous channels and over contiguous time, and PyTorch's conv1d."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, weight, bias = normal(1, case["T"], case["D"]), normal(case["D"], case["W"]) / 2, normal(case["D"])
    grad = normal(1, case["T"], case["D"])
    turned = x.transpose(1, 2).contiguous()

    def leaves(x: Tensor, dtype: torch.dtype = dtype) -> list[Tensor]:
        return [t.detach().to(dtype).requires_grad_(case.grad) for t in (x, weight, bias)]

    ours = both_passes(_ours, leaves(x), grad)
    across = both_passes(_ours, leaves(turned.transpose(1, 2)), grad.transpose(1, 2).contiguous().transpose(1, 2))
    theirs = both_passes(_theirs, leaves(turned), grad.transpose(1, 2).contiguous())
    truth = both_passes(_ours_exactly, leaves(x, torch.float64), grad.double())
    passes = 5 if case.grad else 2  # x and y; then x, the gradients of y and of x
    return Contest(
        {"onchip": Contender(ours), "conv1d": Contender(theirs, _turn), "onchip (B, D, T)": Contender(across)},
        truth=lambda: tuple(t.detach() for t in truth()),
        names=("out", "grad x", "grad weight", "grad bias") if case.grad else ("out",),
        nbytes=passes * x.nbytes,
        served_by=str(onchip.explain(onchip.causal_conv1d, x, weight).chosen),
    )


def _ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return onchip.causal_conv1d(x, weight, bias, activation="silu")


def _ours_exactly(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return onchip.causal_conv1d(x, weight, bias, activation="silu", backend="reference")


def _theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
    return silu(out[..., : x.shape[2]])


def _turn(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The output, and x's gradient, as (B, T, D)."""
    return tuple(t.transpose(1, 2) if t.ndim == 3 else t for t in results)
