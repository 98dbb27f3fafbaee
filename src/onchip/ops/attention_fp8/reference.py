"""The definition of FP8 attention, in plain PyTorch: what a tensor core with exact accumulation would compute.

An e4m3 number is a multiple of 2^-9 of at most 448, so a block's products and their sums are exact in float64: they are
rounded once, to float32, and no order of summation shows in the result. Everything else is in float32. Keys are taken
a block at a time because the rounding of the probabilities depends on the maximum so far.
"""

import itertools
import math

import torch
from torch import Tensor

from onchip.ops.attention import checks
from onchip.ops.attention_fp8.quantize import BLOCK, E4M3, Quantized

PEAK = (
    256.0  # what the largest probability becomes: the highest power of two in e4m3, so that fewer of the small are lost
)
LOG2_E = math.log2(math.e)


def check_lengths(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """The boundaries' values make sense."""
    checks.check_lengths(q, k, None, cu_seqlens_q, cu_seqlens_k)


def attention(
    q: Quantized,
    k: Quantized,
    v: Quantized,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill `out` and `lse`, as `onchip.attention_fp8_with_lse` defines them, of what has been quantised.

    `left` and `right` are the window's reach in keys, -1 for unbounded (causal is `right=0`).
    """
    if cu_seqlens_q is None or cu_seqlens_k is None:
        for b in range(q.values.shape[0]):
            parts = [Quantized(x.values[b], x.scales[b]) for x in (q, k, v)]
            _sequence(parts, left, right, scale, softcap, out[b], lse[b])
        return
    sequences_q, sequences_k = (itertools.pairwise(cu.tolist()) for cu in (cu_seqlens_q, cu_seqlens_k))
    for (q0, q1), (k0, k1) in zip(sequences_q, sequences_k, strict=True):
        parts = [Quantized(x.values[a:b], x.scales[a:b]) for x, a, b in ((q, q0, q1), (k, k0, k1), (v, k0, k1))]
        _sequence(parts, left, right, scale, softcap, out[q0:q1], lse[:, q0:q1])


def _sequence(
    qkv: list[Quantized],
    left: int,
    right: int,
    scale: float,
    softcap: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """One sequence into `out`, (Tq, H, Dv), and `lse`, (H, Tq).

    All heads and queries at once, but not the batch, whose size so cannot matter.
    """
    q, k, v = qkv
    tq, (tk, kv_heads, _) = q.values.shape[0], k.values.shape
    q_values, q_scales = _heads_first(q, kv_heads)  # (Hk, group, Tq, D) and (Hk, group, Tq)
    k_values, k_scales = (x[:, 0] for x in _heads_first(k, kv_heads))
    v_values, v_scales = (x[:, 0] for x in _heads_first(v, kv_heads))
    top = q_scales.new_full(q_scales.shape, -math.inf)  # the running maximum of log2(e) · s
    total = torch.zeros_like(top)
    acc = q_scales.new_zeros(*top.shape, v_values.shape[-1])
    for start in range(0, tk, BLOCK):
        keys = slice(start, min(start + BLOCK, tk))
        rows = _rows_that_see(keys, tq, tk - tq, left, right)
        if rows.start >= rows.stop:
            continue
        dots = _product(q_values[:, :, rows], k_values[:, keys].mT)
        scales = q_scales[:, :, rows, None] * k_scales[:, None, None, keys]
        s = _logits(dots, scales, scale, softcap).masked_fill(
            _hidden(rows, keys, tk - tq, left, right, out.device), -math.inf
        )
        old, new = top[:, :, rows], torch.maximum(top[:, :, rows], s.amax(-1))
        base = new.masked_fill(new == -math.inf, 0.0)  # a row that has seen nothing yet
        p = torch.exp2(s - base[..., None])
        decay = torch.exp2(old - base)
        rounded = (p * PEAK).to(E4M3).double()
        part = _product(rounded, v_values[:, keys]) * (v_scales[:, keys.start, None, None, None] / PEAK)
        total[:, :, rows] = total[:, :, rows] * decay + p.sum(-1)
        acc[:, :, rows] = acc[:, :, rows] * decay[..., None] + part
        top[:, :, rows] = new
    seen = top > -math.inf
    out.copy_((acc / total.masked_fill(~seen, 1.0)[..., None]).flatten(0, 1).transpose(0, 1))
    lse.copy_(((top + total.log2()) / LOG2_E).masked_fill(~seen, -math.inf).flatten(0, 1))


def _heads_first(x: Quantized, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Values in float64, (Hk, group, T, D), and scales, (Hk, group, T)."""
    time, heads, dim = x.values.shape
    values = x.values.double().view(time, kv_heads, heads // kv_heads, dim).movedim(0, 2)
    return values.contiguous(), x.scales.reshape(time, kv_heads, heads // kv_heads).movedim(0, 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(Hk, group, rows, n) times (Hk, n, m), exactly, then rounded to float32."""
    product: Tensor = a.flatten(1, 2) @ b
    return product.float().view(*a.shape[:3], b.shape[-1])


def _logits(dots: Tensor, scales: Tensor, scale: float, softcap: float) -> Tensor:
    """In units of log 2, as exp2 takes them."""
    if softcap > 0:
        return torch.tanh(dots * (scales * (scale / softcap))) * (softcap * LOG2_E)
    return dots * (scales * (scale * LOG2_E))


def _rows_that_see(keys: slice, tq: int, ahead: int, left: int, right: int) -> slice:
    """The queries that see any of these keys, where query i sits on key i + ahead; the rest is left out."""
    first = keys.start - right - ahead if right >= 0 else 0
    end = keys.stop + left - ahead if left >= 0 else tq
    return slice(max(first, 0), max(min(end, tq), 0))


def _hidden(rows: slice, keys: slice, ahead: int, left: int, right: int, device: torch.device) -> Tensor:
    i = torch.arange(rows.start, rows.stop, device=device)[:, None] + ahead
    j = torch.arange(keys.start, keys.stop, device=device)
    hidden = torch.zeros_like(i - j, dtype=torch.bool)
    if left >= 0:
        hidden |= j < i - left
    if right >= 0:
        hidden |= j > i + right
    return hidden
