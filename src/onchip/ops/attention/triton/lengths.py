"""The longest sequence of a packed call, read from the GPU once and not in every layer of a model.

Reading stops the GPU's queue. A model hands the same boundaries to all its layers: what was read is remembered as long
as the tensor lives unchanged. Boundaries made under `torch.inference_mode` do not count their changes and are read each
time. The lengths decide how the work is shared out, never what is computed.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from onchip.ops.attention import checks

_KNOWN = WeakTensorKeyDictionary()  # boundaries: (their version, the rows they were checked against, the longest)


def longest(q: Tensor, k: Tensor, bias: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[int, int]:
    """The lengths of the longest sequences of a packed call, after a check of the boundaries.

    Inside the capture of a CUDA graph nothing can be read: the lengths are then bounds, and packed decoding allots
    splits as if one sequence had all keys.
    """
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        bounds = [x.shape[0] for x in (q, k)]
        if bias is not None:
            spans = (1, 1, *bias.shape)[-2:]
            bounds = [span if span > 1 else bound for span, bound in zip(spans, bounds, strict=True)]
        return bounds[0], bounds[1]
    found = (_longest("cu_seqlens_q", cu_seqlens_q, q.shape[0]), _longest("cu_seqlens_k", cu_seqlens_k, k.shape[0]))
    checks.check_bias_lengths(bias, found)
    return found


def _longest(name: str, cu_seqlens: Tensor, rows: int) -> int:
    if cu_seqlens.is_inference():  # it does not count its changes
        return checks.longest_sequence(name, cu_seqlens, rows)
    known = _KNOWN.get(cu_seqlens)
    if known is None or known[:2] != (cu_seqlens._version, rows):
        known = (cu_seqlens._version, rows, checks.longest_sequence(name, cu_seqlens, rows))
        _KNOWN[cu_seqlens] = known
    return int(known[2])
