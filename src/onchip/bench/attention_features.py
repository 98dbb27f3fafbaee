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
from onchip.bench.operation_case import OperationCase
from onchip.bench.operations import Contender, Contest, both_passes

SUITES = ("dropout", "block_sparse", "paged")
LENGTHS = {"dropout": 2048, "block_sparse": 8192, "paged": 8192}
QUICK = {"dropout": 512, "block_sparse": 2048, "paged": 1024}
SIXTEENTHS = (1, 2, 4, 8, 12)  # of the tiles that a query sees
BLOCK, PAGE, PROBABILITY = 128, 16, 0.1


def cases(suites: Sequence[str], *, dtypes: Sequence[str], lengths: Sequence[int], quick: bool) -> list[OperationCase]:
    """Each suite in float32, unless asked otherwise; dropout and block masks in the forward pass and in both.

    >>> [case.label for case in cases(["dropout"], dtypes=[], lengths=[512], quick=False)]
    ['float32 T 512 H 8 D 64 forward', 'float32 T 512 H 8 D 64 both passes']
    """
    return [
        OperationCase("attention_features", suite, dtype, sizes, grad)
        for suite in suites
        for dtype in dtypes or ("float32",)
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


def contest(case: OperationCase) -> Contest:
    """onchip with the feature, what computes the same, and onchip without it."""
    return {"dropout": _dropout, "block_sparse": _block_sparse, "paged": _paged}[case.suite](case)


def _dropout(case: OperationCase) -> Contest:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None, dropout_p: float = PROBABILITY
    ) -> Tensor:
        return onchip.attention(q, k, v, causal=True, dropout_p=dropout_p, seed=1, backend=backend)  # type: ignore[arg-type]

    return _contest(
        case,
        attend,
        "reference",
        lambda q, k, v: attend(q, k, v, backend="reference"),
        lambda q, k, v: attend(q, k, v, dropout_p=0.0),
    )


def _block_sparse(case: OperationCase) -> Contest:
    order = torch.rand(case["tiles"], case["tiles"], generator=torch.Generator().manual_seed(0)).argsort(-1)
    chosen = order < case["seen"]
    dense = chosen.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    mask = onchip.BlockMask.from_dense(dense, block=BLOCK)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense).transpose(1, 2)

    return _contest(
        case, lambda q, k, v: onchip.attention(q, k, v, block_mask=mask), "sdpa, dense mask", sdpa, onchip.attention
    )


def _contest(
    case: OperationCase,
    attend: Callable[..., Tensor],
    peer: str,
    same: Callable[..., Tensor],
    without: Callable[..., Tensor],
) -> Contest:
    """`attend` and `same` give the same; the truth is what `same` gives in float64."""
    generator = torch.Generator().manual_seed(1)
    shape = 1, case["T"], case["H"], case["D"]
    q, k, v, grad = (torch.randn(shape, generator=generator).to(getattr(torch, case.dtype)) for _ in range(4))

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


def _paged(case: OperationCase) -> Contest:
    """One new query a row over a cache that is full, its pages in random order."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    q = torch.randn(case["B"], 1, case["H"], case["D"], generator=generator).to(dtype)
    k, v = torch.randn(2, case["B"], case["Tk"], case["Hk"], case["D"], generator=generator).to(dtype).unbind(0)
    lengths = torch.full((case["B"],), case["Tk"], dtype=torch.int32)
    pages = case["B"] * case["Tk"] // PAGE
    order = torch.randperm(pages, generator=generator)
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
