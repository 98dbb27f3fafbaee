"""FlashAttention-3's functions, as its hopper/flash_attn_interface.py has them.

They take what flash-attn 2's take here, and run on any device that onchip runs on. Four arguments decide only how a GPU
is used, not what is computed, and have no effect: `num_splits` (into how many parts the keys are split), `pack_gqa`
(whether the query heads of a key head share a tile), `sm_margin` (how many multiprocessors are left to others) and
`deterministic`, as gradients always have the same bits. A row that sees nothing has lse = -inf.
"""

from typing import NoReturn

import torch
from torch import Tensor

from onchip.integrations.flash_attn._arguments import Window, unpack, window
from onchip.ops.attention import attention_with_lse

__all__ = [
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
]

Result = Tensor | tuple[Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """`onchip.attention` under FlashAttention-3's name: `softmax(softmax_scale · (q kᵀ + qv vᵀ)) v`.

    Args:
        q: `(B, Tq, H, D)`.
        k: `(B, Tk, Hk, D)`, H a multiple of Hk.
        v: `(B, Tk, Hk, Dv)`.
        softmax_scale: by default 1/√D, with qv 1/√(D + Dv).
        causal: query i sees keys j ≤ i + Tk - Tq.
        qv: `(B, Tq, H, Dv)`, what meets v in the logits (multi-head latent attention). q and qv, and k and v, are put
            side by side for it, which copies them.
        q_descale: `(B, Hk)`, the factor of q where q, k and v are float8_e4m3fn, 1 by default. Then q, k and v are
            taken out of eight bits exactly, the arithmetic is float32, where FlashAttention-3 rounds probabilities to
            eight bits, and the result is bfloat16.
        k_descale: k's factor.
        v_descale: v's factor.
        window_size: `(left, right)`, -1 for no limit.
        attention_chunk: 0. Anything else raises.
        softcap: bounds the logits; 0 for none.
        num_splits: no effect, like `pack_gqa`, `deterministic` and `sm_margin`: see the module.
        pack_gqa: no effect.
        deterministic: no effect.
        sm_margin: no effect.
        return_attn_probs: return the log-sum-exp too.

    Returns:
        `out`, `(B, Tq, H, Dv)`; with `return_attn_probs`, `(out, softmax_lse)`: the natural log-sum-exp `(B, H, Tq)`.

    Raises:
        NotImplementedError: attention_chunk.
        ValueError, TypeError: what `onchip.attention` refuses; a descale where nothing is in eight bits.

    >>> import torch
    >>> from onchip.integrations.flash_attn import hopper
    >>> q, k = torch.randn(2, 5, 8, 16), torch.randn(2, 7, 2, 16)
    >>> hopper.flash_attn_func(q, k, k, causal=True, num_splits=4).shape
    torch.Size([2, 5, 8, 16])
    """
    return _attend(
        (q, k, v),
        (q_descale, k_descale, v_descale),
        qv,
        softmax_scale,
        causal,
        window_size,
        attention_chunk,
        softcap,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with q, k and v in one tensor, into which their gradients arrive.

    qkv is `(B, T, 3, H, D)`, or `(B, T, num_heads_q + 2·Hk, D)` with num_heads_q given.

    >>> import torch
    >>> from onchip.integrations.flash_attn import hopper
    >>> hopper.flash_attn_qkvpacked_func(torch.randn(2, 5, 8, 16), causal=True, num_heads_q=4).shape
    torch.Size([2, 5, 4, 16])
    """
    if num_heads_q is None:
        q, k, v = unpack("qkv", qkv, 3, packed_rows=False)
    else:
        heads = qkv.shape[-2] - num_heads_q
        if qkv.ndim != 4 or num_heads_q < 1 or heads < 2 or heads % 2:
            raise ValueError(
                "qkv must have shape (batch, time, num_heads_q + 2 · key heads, dim), as num_heads_q is given, "
                f"got {tuple(qkv.shape)} with num_heads_q={num_heads_q}"
            )
        q, k, v = torch.split(qkv, [num_heads_q, heads // 2, heads // 2], dim=-2)
    return _attend(
        (q, k, v),
        (q_descale, k_descale, v_descale),
        None,
        softmax_scale,
        causal,
        window_size,
        attention_chunk,
        softcap,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` for packed sequences: q `(total_q, H, D)`, k and v `(total_k, Hk, D)`, boundaries `(B + 1,)`.

    max_seqlen_q and max_seqlen_k have no effect, as the lengths are read in the boundaries. seqused_q and seqused_k
    raise NotImplementedError.

    >>> import torch
    >>> from onchip.integrations.flash_attn import hopper
    >>> q, starts = torch.randn(9, 8, 16), torch.tensor([0, 4, 9], dtype=torch.int32)
    >>> hopper.flash_attn_varlen_func(q, q, q, starts, starts, 5, 5, causal=True).shape
    torch.Size([9, 8, 16])
    """
    for name, used in (("seqused_q", seqused_q), ("seqused_k", seqused_k)):
        if used is not None:
            raise NotImplementedError(
                f"{name} must be None: leave the rows that are not used out, and out of cu_seqlens"
            )
    return _attend(
        (q, k, v),
        (q_descale, k_descale, v_descale),
        qv,
        softmax_scale,
        causal,
        window_size,
        attention_chunk,
        softcap,
        return_attn_probs,
        (cu_seqlens_q, cu_seqlens_k),
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> NoReturn:
    """Not served: it is there so that importing it works, and raises NotImplementedError.

    >>> from onchip.integrations.flash_attn import hopper
    >>> hopper.flash_attn_with_kvcache(None, None, None)
    Traceback (most recent call last):
    NotImplementedError: flash_attn_with_kvcache is not served here: onchip.attention_with_cache ...
    """
    raise NotImplementedError(
        "flash_attn_with_kvcache is not served here: onchip.attention_with_cache appends to a cache and attends over it"
    )


def _attend(
    qkv: tuple[Tensor, Tensor, Tensor],
    descales: tuple[Tensor | None, Tensor | None, Tensor | None],
    qv: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    attention_chunk: int,
    softcap: float,
    return_attn_probs: bool,
    boundaries: tuple[Tensor, Tensor] | None = None,
) -> Result:
    if attention_chunk != 0:
        raise NotImplementedError(f"attention_chunk must be 0, got {attention_chunk}: onchip has no chunked mask")
    eight_bits = qkv[0].dtype == torch.float8_e4m3fn
    if eight_bits:
        q, k, v = _out_of_eight_bits(qkv, descales, boundaries)
    elif any(descale is not None for descale in descales):
        raise TypeError(f"q_descale, k_descale and v_descale belong to float8_e4m3fn inputs, and q is {qkv[0].dtype}")
    else:
        q, k, v = qkv
    if qv is not None:
        if qv.shape != (*q.shape[:-1], v.shape[-1]):
            raise ValueError(f"qv must have shape {(*q.shape[:-1], v.shape[-1])}, got {tuple(qv.shape)}")
        q, k = torch.cat([q, qv.to(q.dtype) if eight_bits else qv], -1), torch.cat([k, v], -1)
    out, lse = attention_with_lse(
        q,
        k,
        v,
        causal=causal,
        window=window(window_size),
        scale=softmax_scale,
        softcap=softcap,
        cu_seqlens_q=None if boundaries is None else boundaries[0],
        cu_seqlens_k=None if boundaries is None else boundaries[1],
    )
    out = out.to(torch.bfloat16) if eight_bits else out
    return (out, lse) if return_attn_probs else out


def _out_of_eight_bits(
    qkv: tuple[Tensor, Tensor, Tensor],
    descales: tuple[Tensor | None, Tensor | None, Tensor | None],
    boundaries: tuple[Tensor, Tensor] | None,
) -> list[Tensor]:
    """q, k and v in float32, times their factors per sequence and key head."""
    heads = qkv[1].shape[-2]
    batch = qkv[0].shape[0] if boundaries is None else boundaries[0].shape[0] - 1
    wide = []
    for name, x, descale in zip("qkv", qkv, descales, strict=True):
        if x.dtype != torch.float8_e4m3fn:
            raise TypeError(f"{name} must be float8_e4m3fn, as q is, got {x.dtype}")
        factor = torch.ones(batch, heads, device=x.device) if descale is None else descale
        if factor.shape != (batch, heads):
            raise ValueError(f"{name}_descale must have shape ({batch}, {heads}), got {tuple(factor.shape)}")
        factor = factor.float().repeat_interleave(x.shape[-2] // heads, dim=1)
        if boundaries is None:
            factor = factor[:, None]
        else:
            starts = boundaries[0] if name == "q" else boundaries[1]
            factor = factor.repeat_interleave(starts.diff(), dim=0)
        wide.append(x.float() * factor[..., None])
    return wide
