"""What the ops that carry a state along time share: their checks' sentences, packed boundaries, and their results.

They take `(B, T, …)`, or `(total, …)` with `cu_seqlens`; a packed call has a state for each of its sequences.
"""

import warnings
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from onchip.ops._read import read
from onchip.ops.attention.checks import DTYPES, longest_sequence

STATE_DTYPES = {dtype: torch.float64 if dtype == torch.float64 else torch.float32 for dtype in DTYPES}
"""In which type the state of a call with such inputs is carried, and its sums are taken."""


class WithFinalState(NamedTuple):
    """What `return_final_state=True` returns."""

    out: Tensor
    final_state: Tensor


def check_tensor(name: str, x: Tensor | None, shape: tuple[int | str, ...], like: Tensor, *, any_float: bool) -> None:
    """`x` is a floating tensor on `like`'s device, of that shape: a size is a number, or a name where any will do.

    Its dtype is `like`'s, or with `any_float` any of the four.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if not any_float and x.dtype != like.dtype:
        raise TypeError(f"{name} must have x's dtype {like.dtype}, got {x.dtype}")
    if x.device != like.device:
        raise TypeError(f"{name} must be on x's device {like.device}, got {x.device}")
    if x.shape != shape and not _fits(shape, x):  # the first is quick, and decoding asks in every step
        shown = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name} must have shape ({shown}), got {tuple(x.shape)}")


def _fits(shape: tuple[int | str, ...], x: Tensor) -> bool:
    return x.ndim == len(shape) and all(isinstance(n, str) or n == m for n, m in zip(shape, x.shape, strict=True))


def check_boundaries(cu_seqlens: Tensor, x: Tensor) -> None:
    """`cu_seqlens` can be the boundaries of `x`'s sequences; `sequences` reads its values."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {got}")
    if cu_seqlens.device != x.device:
        raise TypeError(f"cu_seqlens must be on x's device {x.device}, got {cu_seqlens.device}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")


_grown = {"warned": False, "looked on a GPU": False}


def warn_of_growth(A: Tensor) -> None:
    """Say once that a state grows where it was to decay. On a GPU only the first call looks: it waits for the GPU."""
    if _grown["warned"] or type(A) not in (Tensor, torch.nn.Parameter) or A.is_meta:
        return
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    if A.is_cuda:
        if _grown["looked on a GPU"] or torch.cuda.is_current_stream_capturing():
            return
        _grown["looked on a GPU"] = True
    if A.amax() > 0:
        _grown["warned"] = True
        warnings.warn(
            f"A has positive entries, the largest {A.amax().item():.3g}: with positive dt the state grows "
            "exponentially along the sequence. Mamba's A is negative, -exp(A_log).",
            stacklevel=3,
        )


def boundaries(cu_seqlens: Tensor, rows: int) -> list[int]:
    """The values of `cu_seqlens`, which must make sense. Runs where an op runs, and not where it is traced."""
    starts: list[int] = read(cu_seqlens).tolist()
    longest_sequence("cu_seqlens", starts, rows)
    return starts


def sequences(cu_seqlens: Tensor, rows: int) -> list[slice]:
    """Each sequence's rows."""
    return [slice(a, b) for a, b in pairwise(boundaries(cu_seqlens, rows))]


def segment_sums(x: Tensor) -> Tensor:
    """`(..., T)` to `(..., T, T)`: entry (i, j) is the sum over j < k ≤ i, and 0 for j > i.

    Each is a sum of its own, over a mask: a difference of two running sums would have the error of the larger.
    """
    size = x.shape[-1]
    after = torch.ones(size, size, dtype=torch.bool, device=x.device).tril(-1)
    return torch.where(after, x[..., :, None], 0).cumsum(-2)
