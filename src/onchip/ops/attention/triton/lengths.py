"""The longest sequences of a packed call. They decide how the work is shared out, never what is computed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from onchip.ops._read import read
from onchip.ops.attention import checks


def longest(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    mask_shape: Sequence[int] | None = None,
) -> tuple[int, int]:
    """The lengths of the longest sequences of a packed call, after a check of the boundaries.

    Inside the capture of a CUDA graph nothing can be read: the lengths are then bounds, and packed decoding allots
    splits as if one sequence had all keys.
    """
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        if mask_shape is not None:
            return mask_shape[0], mask_shape[1]
        bounds = [x.shape[0] for x in (q, k)]
        if bias is not None:
            spans = (1, 1, *bias.shape)[-2:]
            bounds = [span if span > 1 else bound for span, bound in zip(spans, bounds, strict=True)]
        return bounds[0], bounds[1]
    found = (
        checks.longest_sequence("cu_seqlens_q", read(cu_seqlens_q).tolist(), q.shape[0]),
        checks.longest_sequence("cu_seqlens_k", read(cu_seqlens_k).tolist(), k.shape[0]),
    )
    checks.check_spans(bias, mask_shape, found)
    return found
