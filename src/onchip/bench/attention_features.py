"""What features of attention cost or save: dropout, block masks and pages, each against attention without it.

The contender `without` is onchip on the same tensors: with nothing dropped, with every key seen, with the cache in one
piece. The one before it computes the same as onchip with the feature, and is what onchip's error is held against.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

import onchip
from onchip.bench.cases import Device
from onchip.bench.operation_case import OperationCase
from onchip.bench.operations import CPU, Contender, Contest, both_passes

SUITES = ("dropout", "block_sparse", "paged")
LENGTHS = {"dropout": 2048, "block_sparse": 8192, "paged": 8192}
QUICK = {"dropout": 512, "block_sparse": 2048, "paged": 1024}
SIXTEENTHS = (1, 2, 4, 8, 12)  # of the tiles that a query sees
BLOCK, PAGE, PROBABILITY = 128, 16, 0.1


def cases(
    suites: Sequence[str], *, dtypes: Sequence[str], lengths: Sequence[int], quick: bool, device: Device = "cpu"
) -> list[OperationCase]:
    """Each suite in float32, on a GPU in bfloat16; dropout and block masks in the forward pass and in both.

    >>> [case.label for case in cases(["dropout"], dtypes=[], lengths=[512], quick=False)]
    ['float32 T 512 H 8 D 64 forward', 'float32 T 512 H 8 D 64 both passes']
    """
    return [
        OperationCase("attention_features", suite, dtype, sizes, grad)
        for suite in suites
        for dtype in dtypes or ("bfloat16" if device == "cuda" else "float32",)
        for length in lengths or ((QUICK if quick else LENGTHS)[suite],)
        for sizes in _sizes(suite, length)
        for grad in ((False,) if suite == "paged" else (False, True))
    ]


def _sizes(suite: str, length: int) -> list[tuple[tuple[str, int], ...]]:
    if suite == "dropout":
        return [(("T", length), ("H", 8), ("D", 64))]
    if suite == "block_sparse":
        tiles = length // BLOCK
        return [(("T", length), ("H", 2), ("D", 64), ("tiles", tiles), ("seen", tiles * n // 16)) for n in SIXTEENTHS]
    return [(("B", 4), ("Tk", length), ("H", 32), ("Hk", 8), ("D", 128))]


def contest(case: OperationCase, device: torch.device = CPU) -> Contest:
    """onchip with the feature, what computes the same, and onchip without it."""
    return {"dropout": _dropout, "block_sparse": _block_sparse, "paged": _paged}[case.suite](case, device)


def _dropout(case: OperationCase, device: torch.device) -> Contest:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None, dropout_p: float = PROBABILITY
    ) -> Tensor:
        return onchip.attention(q, k, v, causal=True, dropout_p=dropout_p, seed=1, backend=backend)  # type: ignore[arg-type]

    return _contest(
        case,
        device,
        attend,
        "reference",
        lambda q, k, v: attend(q, k, v, backend="reference"),
        lambda q, k, v: attend(q, k, v, dropout_p=0.0),
    )


def _block_sparse(case: OperationCase, device: torch.device) -> Contest:
    generator = torch.Generator(device).manual_seed(0)
    order = torch.rand(case["tiles"], case["tiles"], generator=generator, device=device).argsort(-1)
    chosen = order < case["seen"]
    dense = chosen.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    mask = onchip.BlockMask.from_dense(dense, block=BLOCK)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense).transpose(1, 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return onchip.attention(q, k, v, block_mask=mask)

    return _contest(case, device, ours, "sdpa, dense mask", sdpa, onchip.attention)


def _contest(
    case: OperationCase,
    device: torch.device,
    attend: Callable[..., Tensor],
    peer: str,
    same: Callable[..., Tensor],
    without: Callable[..., Tensor],
) -> Contest:
    """`attend` and `same` give the same; the truth is what `same` gives in float64."""
    generator = torch.Generator(device).manual_seed(1)
    shape, dtype = (1, case["T"], case["H"], case["D"]), getattr(torch, case.dtype)
    q, k, v, grad = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(4))

    def leaves(dtype: torch.dtype | None = None) -> list[Tensor]:
        return [x.detach().to(dtype or x.dtype).requires_grad_(case.grad) for x in (q, k, v)]

    truth = both_passes(same, leaves(torch.float64), grad.double())
    return Contest(
        {
            "onchip": Contender(both_passes(attend, leaves(), grad)),
            peer: Contender(both_passes(same, leaves(), grad)),
            "without": Contender(both_passes(without, leaves(), grad)),
        },
        truth=lambda: tuple(x.detach() for x in truth()),
        names=("out", "grad q", "grad k", "grad v") if case.grad else ("out",),
        nbytes=(8 if case.grad else 4) * q.nbytes,
        served_by=str(onchip.explain(onchip.attention, q, k, v).chosen),
    )


def _paged(case: OperationCase, device: torch.device) -> Contest:
    """One new query a row over a cache that is full, its pages in random order."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(getattr(torch, case.dtype))

    q = normal(case["B"], 1, case["H"], case["D"])
    k, v = (normal(case["B"], case["Tk"], case["Hk"], case["D"]) for _ in range(2))
    lengths = torch.full((case["B"],), case["Tk"], dtype=torch.int32, device=device)
    pages = case["B"] * case["Tk"] // PAGE
    order = torch.randperm(pages, generator=generator, device=device)
    table = order.argsort().view(case["B"], -1).int()
    in_pages = [x.reshape(pages, PAGE, case["Hk"], case["D"])[order] for x in (k, v)]

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

    def call(attend: Callable[[], Tensor]) -> Contender:
        return Contender(lambda: (attend(),))

    return Contest(
        {
            "onchip": call(lambda: onchip.attention_with_cache(q, *in_pages, cache_seqlens=lengths, block_table=table)),
            "sdpa": call(lambda: whole(q, k, v)),
            "without": call(lambda: onchip.attention_with_cache(q, k, v, cache_seqlens=lengths)),
        },
        truth=lambda: (whole(q.double(), k.double(), v.double()),),
        names=("out",),
        nbytes=k.nbytes + v.nbytes,
        served_by=cast(str, onchip.explain(onchip.attention, q, k, v).chosen),
    )
