"""Exact attention without a T×T matrix in memory: the public functions and their argument checks."""

from typing import Literal, cast

import torch
from torch import Tensor

from onchip.ops import _select, _triton
from onchip.ops.attention import checks, cpu, op, reference
from onchip.ops.attention.block_mask import BlockMask

Backend = Literal["cpu", "triton", "reference"]
Window = tuple[int | None, int | None]

TRITON_MAX_HEAD_DIM = 256


def _triton_limits(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    # Here and not beside the kernels, which are not imported before one of them runs.
    if max(q.shape[-1], v.shape[-1]) > TRITON_MAX_HEAD_DIM:
        return f"head dims go to {TRITON_MAX_HEAD_DIM}, got {q.shape[-1]} for q and k, {v.shape[-1]} for v"
    if q.dtype == torch.float64:
        return "it computes in float32, and the call is in float64"
    return _triton.limits(q.device)


IMPLEMENTATIONS = (
    _select.Implementation("cpu", cpu.limits, devices=("cpu", "meta"), batch_invariant=True),
    _select.Implementation(
        "triton", _triton_limits, _triton.DEVICES, on_request=_triton.interpreted_on(), batch_invariant=True
    ),
    _select.Implementation("reference"),
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    block_mask: BlockMask | None = None,
    batch_invariant: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    r"""Exact softmax attention, in memory linear in the sequence length.

    For query head h, with key head h // (H / Hk) and query i sitting on key p = i + Tk - Tq (masks are aligned at the
    last query and the last key):

        t[i, j] = scale · q[i] · k[j]
        s[i, j] = softcap · tanh(t[i, j] / softcap) - slope[h] · |p - j| + bias[h, i, j]      (-inf where masked)
        lse[i]  = log(Σ_j exp s[i, j] + exp sink[h])
        out[i]  = Σ_j kept[i, j] / (1 - dropout_p) · exp(s[i, j] - lse[i]) · v[j]

    The softcap, slope, bias and sink terms are there only where the arguments are. A row that sees nothing gives zeros.

    kept is 1 without dropout. With it, kept[i, j] of sequence b and query head h is 1 where word j % 4 of

        Philox4x32-10(counter=(j // 4, i, h, b), key=(seed mod 2³², seed // 2³²))

    is at least ⌊dropout_p · 2³²⌋, and else 0: the same entries on every device, with any tiles and threads. Of packed
    sequences b is the number, and i and j begin at 0 in each: they drop what the sequences of a batch drop.

    Args:
        q: `(B, Tq, H, D)`, or `(total_q, H, D)` with `cu_seqlens_q`; float64, float32, bfloat16 or float16; any
            strides.
        k: `(B, Tk, Hk, D)` or `(total_k, Hk, D)`; H a multiple of Hk (grouped-query and multi-query attention).
        v: `(B, Tk, Hk, Dv)` or `(total_k, Hk, Dv)`; Dv may differ from D. Head dims from 1 to 512 run in the CPU's
            kernels, to 256 in the GPU's.
        causal: query i sees keys j ≤ p.
        window: `(left, right)`: query i sees keys p - left ≤ j ≤ p + right; None on a side for no limit there.
            With `causal`, right is 0.
        scale: finite factor of q·k; by default 1/√D.
        softcap: bounds the logits to (-softcap, softcap); 0 for none.
        bias: broadcastable to `(B, H, Tq, Tk)`; floating (added; where the logit falls below -2.3e38, or -1.2e308 in
            float64, the key is hidden) or boolean (True = attend). For packed sequences Tq and Tk are the longest
            lengths, and each sequence reads the top-left corner.
        alibi_slopes: `(H,)` or `(B, H)`, floating: penalty per unit of distance.
        sinks: `(H,)`, floating: one more logit per head that takes probability and gives no value.
        cu_seqlens_q: `(B + 1,)` int32 or int64, from 0 to total_q, not descending: sequence b is rows
            `cu_seqlens_q[b]:cu_seqlens_q[b + 1]`.
        cu_seqlens_k: the same for k and v; by default `cu_seqlens_q`.
        dropout_p: the probability, in [0, 1), with which each attention probability is dropped.
        seed: of the dropped entries, 0 ≤ seed < 2⁶³; by default drawn from PyTorch's default generator for the CPU, so
            that `torch.manual_seed` governs it. Under `torch.compile(fullgraph=True)` and `torch.export` it must be
            given where there is dropout.
        block_mask: a `BlockMask` of shape (Tq, Tk), for all or for each sequence and query head: queries see what it
            lets them see, and of that what the other masks do. Its tiles that nobody sees cost nothing. For packed
            sequences Tq and Tk are the longest lengths, and each sequence reads the top-left corner.
        batch_invariant: a row of out and lse has the same bits whatever is computed with it: in a prefill, a chunk or a
            step, packed or not, over a cache or not. See Numerics.
        backend: "cpu", "triton" or "reference" asks for an implementation and raises where it cannot serve; by default
            the fastest that can. See `onchip.explain`.

    Returns:
        `(B, Tq, H, Dv)` or `(total_q, H, Dv)`, in q's dtype, contiguous.

    Raises:
        ValueError: shapes, lengths or values that do not fit, naming the argument, what was expected and what came.
        TypeError: dtypes or devices that do not fit.

    Numerics: products and sums accumulate in float32 (float64 for float64). On a CPU probabilities are never rounded to
    a 16-bit type; on a GPU they are, before they meet v, as in FlashAttention, and float32 products there are exact
    unless PyTorch's own may use TF32. The same bits on every run, and a row's bits do not depend on the rest of the
    batch or on threads; but few queries (a decoding step) are summed in another order than many, and on a GPU the
    longest of packed sequences decides for all which. With `batch_invariant` there is one order, by tiles and, on a
    GPU, splits of fixed size from the first key on: the bits depend on the row's query, the keys and values it sees,
    the settings and the machine alone (with dropout, on its place too). Gradients are as without; the reference
    refuses it. Dropout acts after the softmax: lse is of all logits.
    Cost: 2·B·H·Tq·Tk·(D + Dv) operations (half when causal, times the density of a block mask), 2.5 times that backward
    (3.5 on a GPU, for sums without atomics); memory for the output and B·H·Tq log-sum-exps. Dropout runs Philox once
    for four keys, backward again, and stores no mask. `batch_invariant` costs nothing for many queries on a CPU; a
    decoding step takes 2 to 3.5 times as long there, and its keys are not shared out to threads. On a GPU tiles are
    smaller for it.
    Differentiable in q, k, v, bias, alibi_slopes and sinks; twice with `backend="reference"`.
    Under autocast, float32 tensors are cast as for `torch.nn.functional.scaled_dot_product_attention`.

    Source: Dao et al., FlashAttention (arXiv 2205.14135, algorithms 1 and 4); Dao, FlashAttention-2 (arXiv 2307.08691);
    Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), for Philox.
    Here the causal mask is aligned bottom-right (PyTorch's `is_causal` is top-left), empty rows give lse = -inf, and
    gradients flow through lse.

    >>> import torch, onchip
    >>> q, k = torch.randn(2, 5, 8, 16), torch.randn(2, 7, 2, 16)
    >>> onchip.attention(q, k, k, causal=True, window=(3, None)).shape
    torch.Size([2, 5, 8, 16])
    """
    return attention_with_lse(
        q,
        k,
        v,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        bias=bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        dropout_p=dropout_p,
        seed=seed,
        block_mask=block_mask,
        batch_invariant=batch_invariant,
        backend=backend,
    )[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    block_mask: BlockMask | None = None,
    batch_invariant: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention` together with its log-sum-exp, through which gradients flow too.

    Takes and raises what `attention` does, at the same cost.

    Returns:
        `out` as `attention` returns it, and `lse`, the natural logarithm of each row's sum of exponentials (the sink's
        included): `(B, H, Tq)`, packed `(H, total_q)`; float32, float64 for float64. -inf for a row that sees nothing.

    >>> import torch, onchip
    >>> q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 4, 2, 8)
    >>> out, lse = onchip.attention_with_lse(q, k, k)
    >>> torch.allclose(lse, (torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5).logsumexp(-1), atol=1e-6)
    True
    """
    q, k, v = checks.autocast(q, k, v)
    checks.check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    if cu_seqlens_q is not None and cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    left, right = checks.reach(causal, window)
    checks.check_flag("batch_invariant", batch_invariant)
    checks.check_factors(scale, softcap)
    dropout_p, seed = checks.dropout(dropout_p, seed)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if bias is not None or alibi_slopes is not None or sinks is not None:
        checks.check_score_terms(q, k, bias, alibi_slopes, sinks, cu_seqlens_q)
    if block_mask is not None:
        checks.check_block_mask(q, k, block_mask, cu_seqlens_q)
    chosen = _select.choose("attention", IMPLEMENTATIONS, backend, q, k, v, batch_invariant=batch_invariant)
    if chosen == "reference":
        if cu_seqlens_q is not None and not torch.compiler.is_compiling():
            span = None if block_mask is None else block_mask.shape
            checks.check_lengths(q, k, bias, cu_seqlens_q, cast(Tensor, cu_seqlens_k), span)
        return reference.attention_with_lse(
            q,
            k,
            v,
            left=left,
            right=right,
            scale=scale,
            softcap=softcap,
            bias=bias,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            dropout_p=dropout_p,
            seed=seed,
            block_mask=block_mask,
        )
    settings = (left, right, float(scale), float(softcap))
    tiles = (None, None) if block_mask is None else (block_mask.tensors, block_mask.shape)
    optional = (bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, dropout_p, seed, *tiles, backend)
    return op.attention(q, k, v, *settings, *optional, batch_invariant=batch_invariant)


for _function in (attention, attention_with_lse):
    _select.register(_function, IMPLEMENTATIONS, tensors=3)
