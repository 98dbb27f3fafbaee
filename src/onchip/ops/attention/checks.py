"""What a call to attention must satisfy, and the sentences that say so when it does not."""

import itertools
import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from onchip.ops.attention.block_mask import BlockMask

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as PyTorch's autocast wants them for its own attention: in the low precision, except float64."""
    if not torch._C._is_any_autocast_enabled() or not all(isinstance(x, Tensor) for x in (q, k, v)):
        return q, k, v
    if torch.amp.is_autocast_available(q.device.type) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    return q, k, v


_FAR = 1 << 48  # longer than any sequence, and positions may be added to it


def reach(causal: bool, window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    """The window's `(left, right)` as integers, -1 for unbounded."""
    check_flag("causal", causal)
    if window is None:
        return (-1, 0) if causal else (-1, -1)
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise ValueError(f"window must be a pair (left, right) of integers or None, got {window!r}")
    for name, side in zip(("left", "right"), window, strict=True):
        if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 0):
            raise ValueError(f"window's {name} must be None (unbounded) or an integer of at least 0, got {side!r}")
    left, right = (-1 if side is None else min(side, _FAR) for side in window)
    return left, 0 if causal else right


def check_flag(name: str, x: object) -> None:
    """A switch is no number and no tensor."""
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False, got {x!r}")


def check_factors(scale: float | None, softcap: float) -> None:
    """scale and softcap are finite numbers, which a tensor is not: no gradient would reach it."""
    for name, x in (("scale", 0.0 if scale is None else scale), ("softcap", softcap)):
        if not isinstance(x, float | int | numbers.Real):
            raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    # Comparisons, as torch.compile cannot trace math.isfinite of a number that varies.
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"softcap must be finite and not negative (0 for none), got {softcap}")


def dropout(dropout_p: float, seed: int | None) -> tuple[float, int]:
    """The probability and the seed of the mask, drawn from PyTorch's default generator where none is given."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, float | int | numbers.Real):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    if seed is None:
        seed = int(torch.randint(_SEEDS, ()).item()) if dropout_p > 0 else 0
    elif isinstance(seed, bool) or not isinstance(seed, int | torch.SymInt):
        raise TypeError(f"seed must be an integer or None, got {type(seed).__name__}")
    elif not 0 <= seed <= _SEEDS:
        raise ValueError(f"seed must be at least 0 and below 2**63, got {seed}")
    return float(dropout_p), seed


_SEEDS = (1 << 63) - 1  # 2**63 itself is no number of 64 bits


def check_tensors(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
    """q, k, v and the boundaries fit each other in type, rank and shape."""
    packed = cu_seqlens_q is not None
    if not packed and cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_q must be given where cu_seqlens_k is")
    rank = 3 if packed else 4
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
        if x.ndim != rank:
            layout = "(total, heads, dim), as cu_seqlens_q is given" if packed else "(batch, time, heads, dim)"
            raise ValueError(f"{name} must have {rank} dimensions {layout}, got shape {tuple(x.shape)}")
        if x is not q and (x.dtype != q.dtype or x.device != q.device):
            raise TypeError(
                f"{name} must have q's dtype and device ({q.dtype}, {q.device}), got ({x.dtype}, {x.device})"
            )
    # Unpacked once: a shape costs as much as ten comparisons, and these are the price of every small call.
    (*rows, heads, head_dim), (*keys, key_dim), (*values, value_dim) = q.shape, k.shape, v.shape
    if key_dim != head_dim:
        raise ValueError(f"k must have q's head dim {head_dim}, got shape {tuple(k.shape)}")
    if keys != values:
        raise ValueError(
            f"v must have k's batch, time and heads {tuple(keys)} before its head dim, got shape {tuple(v.shape)}"
        )
    if not packed and keys[0] != rows[0]:
        raise ValueError(f"k must have q's batch size {rows[0]}, got shape {tuple(k.shape)}")
    if head_dim == 0 or value_dim == 0:
        raise ValueError(f"head dims must be at least 1, got {head_dim} for q and k, {value_dim} for v")
    if heads == 0 or keys[-1] == 0 or heads % keys[-1] != 0:
        raise ValueError(f"q's heads must be a multiple of k's, both at least 1, got {heads} and {keys[-1]}")
    if packed:
        _check_boundaries(q, cu_seqlens_q, cu_seqlens_k)


def _check_boundaries(q: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu is None:
            continue
        if not isinstance(cu, Tensor) or cu.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be an int32 or int64 tensor, got {getattr(cu, 'dtype', type(cu).__name__)}")
        if cu.device != q.device:
            raise TypeError(f"{name} must be on q's device {q.device}, got {cu.device}")
        if cu.ndim != 1 or cu.shape[0] == 0:
            raise ValueError(f"{name} must have shape (sequences + 1,), got {tuple(cu.shape)}")
        if cu_seqlens_q is not None and cu.shape != cu_seqlens_q.shape:
            raise ValueError(f"{name} must have cu_seqlens_q's length {cu_seqlens_q.shape[0]}, got {cu.shape[0]}")


def check_score_terms(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
) -> None:
    """Bias, slopes and sinks fit q and k; for packed sequences the bias's lengths are left to `check_lengths`."""
    heads = q.shape[-2]
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    for name, x in (("bias", bias), ("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES and not (name == "bias" and x.dtype == torch.bool):
            kinds = "floating or boolean" if name == "bias" else "floating"
            raise TypeError(f"{name} must be {kinds}, got {x.dtype}")
        if x.device != q.device:
            raise TypeError(f"{name} must be on q's device {q.device}, got {x.device}")
    if alibi_slopes is not None and alibi_slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes must have shape ({heads},) or ({batch}, {heads}), got {tuple(alibi_slopes.shape)}"
        )
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must have shape ({heads},), got {tuple(sinks.shape)}")
    if bias is not None:
        lengths = ("Tq", "Tk") if cu_seqlens_q is not None else (q.shape[1], k.shape[1])
        full = (batch, heads, *lengths)
        sizes = [n for n in full if isinstance(n, int)]
        if bias.ndim > 4 or any(
            got not in (1, want) for got, want in zip(_pad_shape(bias), full, strict=True) if want in sizes
        ):
            shown = ", ".join(map(str, full))
            raise ValueError(f"bias must be broadcastable to ({shown}), got shape {tuple(bias.shape)}")


def check_block_mask(q: Tensor, k: Tensor, block_mask: BlockMask, cu_seqlens_q: Tensor | None) -> None:
    """The block mask fits q and k; for packed sequences its lengths are left to `check_lengths`."""
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask must be a BlockMask, got {type(block_mask).__name__}")
    if block_mask.device != q.device:
        raise TypeError(f"block_mask must be on q's device {q.device}, got {block_mask.device}")
    heads = q.shape[-2]
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    for name, got, want in (("sequences", block_mask.batch, batch), ("heads", block_mask.heads, heads)):
        if got not in (1, want):
            raise ValueError(f"block_mask must be of 1 or {want} {name}, got {block_mask!r}")
    if cu_seqlens_q is None and block_mask.shape != (q.shape[1], k.shape[1]):
        raise ValueError(f"block_mask must be of shape ({q.shape[1]}, {k.shape[1]}), got {block_mask!r}")


def check_lengths(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    mask_shape: Sequence[int] | None = None,
) -> tuple[int, int]:
    """The boundaries' values make sense; the lengths of the longest sequences.

    Reads the values, so it runs where the op runs and not where it is traced.
    """
    longest = (
        longest_sequence("cu_seqlens_q", cu_seqlens_q.tolist(), q.shape[0]),
        longest_sequence("cu_seqlens_k", cu_seqlens_k.tolist(), k.shape[0]),
    )
    check_spans(bias, mask_shape, longest)
    return longest


def longest_sequence(name: str, starts: list[int], rows: int) -> int:
    """The length of the longest of the sequences between these boundaries, which must make sense."""
    if starts[0] != 0 or starts[-1] != rows:
        raise ValueError(f"{name} must run from 0 to the number of rows {rows}, got {starts[0]} to {starts[-1]}")
    lengths = [b - a for a, b in itertools.pairwise(starts)]
    if min(lengths, default=0) < 0:
        at = next(i for i, n in enumerate(lengths) if n < 0)
        raise ValueError(f"{name} must not descend, got {starts[at]} followed by {starts[at + 1]} at index {at + 1}")
    return max(lengths, default=0)


def check_spans(bias: Tensor | None, mask_shape: Sequence[int] | None, longest: tuple[int, int]) -> None:
    """A packed call's bias and block mask span the longest sequences."""
    if mask_shape is not None and tuple(mask_shape) != longest:
        raise ValueError(
            f"block_mask must be of the longest lengths ({longest[0]}, {longest[1]}), got {tuple(mask_shape)}"
        )
    if bias is not None and any(got not in (1, want) for got, want in zip(_pad_shape(bias)[2:], longest, strict=True)):
        raise ValueError(
            f"bias must be broadcastable to the longest lengths ({longest[0]}, {longest[1]}) in its last two "
            f"dimensions, got shape {tuple(bias.shape)}"
        )


def _pad_shape(bias: Tensor) -> tuple[int, ...]:
    return (1,) * (4 - bias.ndim) + tuple(bias.shape)
