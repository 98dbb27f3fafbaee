"""FlashAttention-3's FP8 attention, for inference: the public functions and their argument checks."""

from typing import Literal

import torch
from torch import Tensor

from onchip.ops import _select, _triton
from onchip.ops.attention import Window, checks
from onchip.ops.attention_fp8 import op

Backend = Literal["triton", "reference"]

TRITON_MAX_HEAD_DIM = 256


def _triton_limits(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    # Here and not beside the kernel, which is not imported before it runs.
    if max(q.shape[-1], v.shape[-1]) > TRITON_MAX_HEAD_DIM:
        return f"head dims go to {TRITON_MAX_HEAD_DIM}, got {q.shape[-1]} for q and k, {v.shape[-1]} for v"
    if q.device.type != "cuda" or not torch.cuda.is_available() or _triton.missing is not None:
        return _triton.limits(q.device)
    if torch.version.hip:
        name = torch.cuda.get_device_name(q.device)
        return f"it needs NVIDIA's e4m3, and the {name} has another format of eight bits; onchip.attention serves it"
    major, minor = torch.cuda.get_device_capability(q.device)
    if (major, minor) < (8, 9):
        name = torch.cuda.get_device_name(q.device)
        return (
            f"it needs tensor cores for FP8 (compute capability 8.9 or newer), and the {name} has {major}.{minor}; "
            "onchip.attention is faster there, and more precise"
        )
    return None


IMPLEMENTATIONS = (
    _select.Implementation("triton", _triton_limits, _triton.DEVICES, on_request=_triton.interpreted_on()),
    _select.Implementation("reference"),
)


def attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_scales: bool = True,
    incoherent: bool = True,
    seed: int = 0,
    backend: Backend | None = None,
) -> Tensor:
    r"""Softmax attention whose two products are in eight bits (e4m3), for inference.

    With M = diag(random signs) · Hadamard / √D, which is orthogonal, and e4m3(x) = rounded x / a over a scale a of its
    block, (rows of 128) x (one head), that takes the largest magnitude to 448:

        q', k', v' = e4m3(q M), e4m3(k M), e4m3(v)                 so that (q M) · (k M) = q · k
        s[i, j]    = scale · (q'[i] · k'[j]) · a_q[i] · a_k[j]      softcap · tanh(s / softcap) where there is a softcap
        p[i, j]    = exp(s[i, j] - top[i]) · 2^8                    top[i]: the largest logit up to j's block of keys
        out[i]     = Σ_j e4m3(p[i, j]) · v'[j] · a_v[j] / Σ_j p[i, j]

    where the terms of earlier blocks are multiplied by exp(old top - new top) when the top grows.

    Args:
        q: `(B, Tq, H, D)`, or `(total_q, H, D)` with `cu_seqlens_q`; float32, bfloat16 or float16; any strides.
        k: `(B, Tk, Hk, D)` or `(total_k, Hk, D)`; H a multiple of Hk.
        v: `(B, Tk, Hk, Dv)` or `(total_k, Hk, Dv)`; Dv may differ from D. Head dims from 1 to 256 run in the kernel.
        causal, window, scale, softcap, cu_seqlens_q, cu_seqlens_k: as in `onchip.attention`.
        block_scales: a scale for every 128 rows of a head; False: one for a head of a sequence.
        incoherent: multiply q and k by M, which spreads an outlier over the head dim (padded with zeros to a power of
            two). False rounds q and k as they are.
        seed: of the signs, at least 0; the same signs on every device.
        backend: "triton" or "reference" asks for an implementation and raises where it cannot serve; by default the
            fastest that can. See `onchip.explain`.

    Returns:
        `(B, Tq, H, Dv)` or `(total_q, H, Dv)`, in q's dtype, contiguous.

    Raises:
        ValueError: shapes, lengths or values that do not fit, naming the argument, what was expected and what came.
        TypeError: dtypes or devices that do not fit.
        RuntimeError: a gradient is asked for; `onchip.attention` has gradients.

    Numerics: e4m3 keeps four significant bits. On normal inputs of which a thousandth is ten times as large
    (`reproductions/flashattention3.py`) the root mean square error is 9e-3, without incoherent processing 2e-2; that of
    `onchip.attention` in float16 is 2e-4. Logits, sums and the log-sum-exp are in float32. The reference's products are
    exact before they are rounded to it; a tensor core's are summed in somewhat less than float32. The same bits on
    every run, and a row's do not depend on the rest of the batch. An infinity or a NaN makes NaN of its block.
    Cost: 2·B·H·Tq·Tk·(D + Dv) operations, half when causal, on a GPU at twice the rate of 16-bit products; one pass
    over q, k and v to round them. Keys are not split: for decoding `onchip.attention` is the better choice. On a CPU it
    is an emulation, several times slower than `onchip.attention`.
    Under autocast, float32 tensors are cast as for `onchip.attention`.

    Source: Shah et al., FlashAttention-3 (arXiv 2407.08608, §3.3). Its released kernel takes tensors in e4m3 and their
    scales from the caller; here both are made inside, as the paper has it. FlashAttention-3's tiles are larger than 128
    keys for some head dims.

    >>> import torch, onchip
    >>> q, k, v = torch.randn(3, 1, 300, 4, 64).unbind(0)
    >>> error = onchip.attention_fp8(q, k, v, causal=True) - onchip.attention(q, k, v, causal=True)
    >>> bool(error.square().mean().sqrt() < 0.03)
    True
    """
    return attention_fp8_with_lse(
        q,
        k,
        v,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        block_scales=block_scales,
        incoherent=incoherent,
        seed=seed,
        backend=backend,
    )[0]


def attention_fp8_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_scales: bool = True,
    incoherent: bool = True,
    seed: int = 0,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention_fp8` together with the log-sum-exp of its logits.

    Takes and raises what `attention_fp8` does, at the same cost.

    Returns:
        `out` as `attention_fp8` returns it, and `lse`, the natural logarithm of each row's sum of exponentials, of the
        logits as they come from the rounded q and k: `(B, H, Tq)`, packed `(H, total_q)`; float32. -inf for a row that
        sees nothing.

    >>> import torch, onchip
    >>> q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 4, 2, 8)
    >>> out, lse = onchip.attention_fp8_with_lse(q, k, k)
    >>> out.shape, lse.shape
    (torch.Size([1, 3, 2, 8]), torch.Size([1, 2, 3]))
    """
    q, k, v = checks.autocast(q, k, v)
    checks.check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    _check_dtype(q)
    left, right = checks.reach(causal, window)
    checks.check_factors(scale, softcap)
    _check_options(block_scales, incoherent, seed)
    if cu_seqlens_q is not None and cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = _select.choose("attention_fp8", IMPLEMENTATIONS, backend, q, k, v)
    settings = (left, right, float(scale), float(softcap))
    rounding = (block_scales, seed if incoherent else None)
    return op.attention_fp8(q, k, v, *settings, cu_seqlens_q, cu_seqlens_k, *rounding, chosen)


def _check_dtype(q: Tensor) -> None:
    if q.dtype == torch.float64:
        raise TypeError(f"q must be float32, bfloat16 or float16, got {q.dtype}; onchip.attention computes in float64")


def _check_options(block_scales: bool, incoherent: bool, seed: int) -> None:
    for name, x in (("block_scales", block_scales), ("incoherent", incoherent)):
        if not isinstance(x, bool):
            raise TypeError(f"{name} must be True or False, got {x!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must be from 0 to 2^63 - 1, got {seed}")


for _function in (attention_fp8, attention_fp8_with_lse):
    _select.register(_function, IMPLEMENTATIONS, tensors=3)
