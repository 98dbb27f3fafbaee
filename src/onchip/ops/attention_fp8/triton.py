"""FP8 attention in Triton: attention's own forward kernel with e4m3 operands, their scales, and shifted probabilities.

The tile of keys is the block that shares a scale, as the reference has it; the tile of queries can be any. Q, K and V
are quantised beforehand, V with its keys side by side: the tensor cores of sm_90 take e4m3 operands only so. The kernel
was run in Triton's interpreter and compiled for sm_89, sm_90 and sm_100; on a GPU it has not been run.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from onchip.ops import _triton
from onchip.ops._triton import Launch
from onchip.ops.attention.triton import schedule, scores, softmax, tiles
from onchip.ops.attention.triton.arguments import Rows
from onchip.ops.attention.triton.launches import Call
from onchip.ops.attention.triton.lengths import longest
from onchip.ops.attention.triton.schedule import Window
from onchip.ops.attention.triton.softmax import LN2
from onchip.ops.attention_fp8 import reference
from onchip.ops.attention_fp8.quantize import BLOCK, Quantized

PEAK: tl.constexpr = tl.constexpr(reference.PEAK)
NARROWEST = 32  # what tensor cores sum over in one instruction on e4m3
ROWS, WARPS, STAGES = 128, 8, 2  # two warpgroups of 64 rows, and one tile of keys loaded ahead
ROWS_OF_WIDE = 64  # of heads over 128 wide: more rows do not fit into registers


class Scaled(NamedTuple):
    """Rows of e4m3, or columns, and their scales."""

    rows: Any
    scales: Rows


class Columns(NamedTuple):
    """A `(B, H, D, T)` tensor whose keys are contiguous."""

    ptr: Any
    batch: int
    head: int
    dim: int

    @classmethod
    def of(cls, x: Tensor) -> "Columns":
        """Of a `(B, T, H, D)` or `(total, H, D)` tensor that `along_keys` has laid out."""
        batch = x.stride(0) if x.ndim == 4 else 0
        return cls(x, batch, x.stride(-2), x.stride(-1))


def along_keys(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A copy of `(B, T, H, D)` or `(total, H, D)` with contiguous keys.

    Tiles of keys begin at multiples of 16, or they would be loaded a byte at a time. Packed sequences are moved apart
    for that: sequence b begins with slot `schedule.slot_of(b)`; nobody reads what is between them.
    """
    *batch, time, heads, dim = x.shape
    if cu_seqlens is None:
        return x.new_empty(*batch, heads, dim, -(-time // 16) * 16)[..., :time].movedim(-1, -3).copy_(x)
    sequence = torch.arange(cu_seqlens.shape[0], device=x.device)
    shift = (cu_seqlens // BLOCK + sequence) * BLOCK - cu_seqlens
    row = torch.arange(time, device=x.device)
    moved = row + shift[torch.bucketize(row, cu_seqlens[1:], right=True)]
    slots = time // BLOCK + cu_seqlens.shape[0]
    columns = x.new_empty(heads, dim, slots * BLOCK, dtype=torch.uint8).movedim(-1, 0)
    return columns.index_copy_(0, moved, x.view(torch.uint8)).view(x.dtype)


def check_lengths(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """The boundaries' values make sense."""
    longest(q, k, None, cu_seqlens_q, cu_seqlens_k)


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
    """Fill `out` and `lse`, of what has been quantised."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        lengths = q.values.shape[1], k.values.shape[1]
    else:
        lengths = longest(q.values, k.values, None, cu_seqlens_q, cu_seqlens_k)
    architecture = _triton.architecture(q.values.device)
    settings = (left, right, scale, softcap, None, None, None, cu_seqlens_q, cu_seqlens_k, lengths, architecture)
    call = Call(q.values, k.values, along_keys(v.values, cu_seqlens_k), *settings)
    with _triton.on_device_of(out):
        launch(call, q.scales, k.scales, v.scales, out, lse).run()


def launch(call: Call, q_scales: Tensor, k_scales: Tensor, v_scales: Tensor, out: Tensor, lse: Tensor) -> Launch:
    """The one kernel's launch; `call` is of the values in e4m3."""
    features = call.features._replace(
        head_width=max(call.features.head_width, NARROWEST),
        folded=True,  # the factor of q·k goes into the scales
    )
    rows = ROWS if max(features.head_width, features.value_width) <= 128 else ROWS_OF_WIDE
    slots, all_slots = call.slots(call.q, features.group, rows)
    *sizes, factors, _ = call.shared
    views = (Rows.of(call.q), Rows.of(call.k), Columns.of(call.v))
    scales = (Rows.of(x[..., None]) for x in (q_scales, k_scales, v_scales))
    arguments = (
        *map(Scaled, views, scales), Rows.of(out), Rows.of_lse(lse), call.terms, call.sequences,
        slots, call.heads_kv, *sizes, factors, features, rows, BLOCK, call.architecture == "interpreter",
    )  # fmt: skip
    return Launch(attend, (all_slots * call.heads_kv,), arguments, WARPS, STAGES)


@triton.jit(do_not_specialize=["slots", "heads_kv", "tq", "tk", "left", "right"])
def attend(
    q,
    k,
    v,
    out,
    lse,
    terms,
    sequences,
    slots,
    heads_kv,
    tq,
    tk,
    left,
    right,
    factors,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A program computes the output and the log-sum-exp of BLOCK_M rows. q, k, v: `Scaled`; out, lse: `Rows`."""
    pid = tl.program_id(0)
    kv_head, slot = pid % heads_kv, pid // heads_kv
    place, tile, exists = schedule.row_tile(slot, slots, sequences, tq, tk, F, BLOCK_M)
    if not exists:
        return
    window = Window(left, right)
    rows = scores.rows_of(tile * BLOCK_M + tl.arange(0, BLOCK_M), kv_head, terms, place, F)
    time = place.q_start + rows.query
    first, last = tile * BLOCK_M // F.group, (tile * BLOCK_M + BLOCK_M - 1) // F.group
    start, whole, ragged, stop = schedule.keys_seen(first, tl.minimum(last, place.tq - 1), place, window, F, BLOCK_N)

    q_start = tiles.offsets(q.rows, place.b, time, rows.head)
    q_tile = tiles.load(q.rows, q_start, rows.inside, F.head_dim, F.head_width, True)
    q_scale = tl.load(q.scales.ptr + tiles.offsets(q.scales, place.b, time, rows.head), mask=rows.inside, other=0.0)
    v_start = place.k_start
    if sequences.cu_q is not None:
        v_start = schedule.slot_of(sequences.cu_k, place.b, 1, BLOCK_N) * BLOCK_N
    queries, keys = (q_tile, q_scale), (kv_head, v_start)

    maximum, total = softmax.begin(terms.sinks, rows.head, True, BLOCK_M)
    WIDTH: tl.constexpr = F.value_width  # Triton 3.6 takes no attribute inside a list
    carry = (maximum, total, tl.zeros([BLOCK_M, WIDTH], tl.float32))
    if F.left:
        carry = _keys(
            carry, start, whole, queries, keys, rows, k, v, terms, place, window, factors, F, BLOCK_N, True, INTERPRETED
        )
    carry = _keys(
        carry, whole, ragged, queries, keys, rows, k, v, terms, place, window, factors, F, BLOCK_N, False, INTERPRETED
    )
    carry = _keys(
        carry, ragged, stop, queries, keys, rows, k, v, terms, place, window, factors, F, BLOCK_N, True, INTERPRETED
    )

    maximum, total, weighted = carry
    share, logarithm = softmax.finish(maximum, total)
    out_start, lse_start = tiles.offsets(out, place.b, time, rows.head), tiles.offsets(lse, place.b, time, rows.head)
    tiles.store(out, out_start, rows.inside, weighted * share[:, None], F.value_dim, F.value_width)
    tl.store(lse.ptr + lse_start, logarithm * LN2, mask=rows.inside)


@triton.jit
def _keys(
    carry, start, stop, queries, keys, rows, k, v, terms, place, window, factors,
    F: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Attend to the keys from start to stop."""
    maximum, total, weighted = carry
    q_tile, q_scale = queries
    kv_head, v_start = keys
    if not F.softcap:
        q_scale *= factors.logit
    along = scores.along(rows, terms, 1)
    for first in range(start, stop, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        inside = j < place.tk
        k_start = tiles.offsets(k.rows, place.b, place.k_start + j, kv_head)
        k_tile = tiles.load(k.rows, k_start, inside, F.head_dim, F.head_width, MASKED)
        k_scale = tl.load(k.scales.ptr + tiles.offsets(k.scales, place.b, place.k_start + first, kv_head))
        products = tl.dot(q_tile, tl.trans(k_tile)) * (q_scale * k_scale)[:, None]
        s = scores.logits(products, along, j[None, :], terms, place, window, factors, F, MASKED)
        p, maximum, total, shrink = softmax.step(maximum, total, s, 1.0)
        v_tile = _columns(v.rows, place.b, kv_head, v_start + j, inside, F, MASKED)
        v_scale = tl.load(v.scales.ptr + tiles.offsets(v.scales, place.b, place.k_start + first, kv_head))
        part = tl.dot(_rounded(p * PEAK, v_tile.dtype, INTERPRETED), tl.trans(v_tile))
        weighted = weighted * shrink[:, None] + part * (v_scale / PEAK)
    return maximum, total, weighted


@triton.jit
def _columns(x, b, head, time, inside, F: tl.constexpr, CHECKED: tl.constexpr):
    """A (value_width, keys) tile; zero beyond value_dim and, where CHECKED, where not `inside`."""
    d = tl.arange(0, F.value_width)
    start = b.to(tl.int64) * x.batch + head.to(tl.int64) * x.head + d.to(tl.int64) * x.dim
    pointers = x.ptr + start[:, None] + time[None, :]
    if CHECKED:
        return tl.load(pointers, mask=(d < F.value_dim)[:, None] & inside[None, :], other=0.0)
    elif F.value_dim == F.value_width:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(d < F.value_dim)[:, None], other=0.0)


@triton.jit
def _rounded(p, E4M3: tl.constexpr, INTERPRETED: tl.constexpr):
    """Probabilities in e4m3, to nearest, ties to even."""
    if INTERPRETED:
        # The interpreter's own conversion drops what is carried into the exponent; of a number of e4m3 it is exact.
        # Adding 2^20 times the number's power of two, at least 2^-6, leaves it three bits after the point.
        exponent = tl.maximum(p.to(tl.int32, bitcast=True) & 0x7F800000, (127 - 6) << 23)
        coarse = (exponent + (20 << 23)).to(tl.float32, bitcast=True)
        p = (p + coarse) - coarse
    return p.to(E4M3)
