"""The definition of attention, in plain PyTorch: any dtype, any device, differentiable any number of times.

Everything else that calls itself attention is compared with this file. It writes the (B, H, Tq, Tk) logits to memory;
that is the price of being readable.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onchip.ops.attention.block_mask import BlockMask


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    left: int = -1,
    right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    block_mask: BlockMask | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp, as `onchip.attention_with_lse` defines them; arguments already checked.

    `left` and `right` are the window's reach in keys, -1 for unbounded (causal is `right=0`). Arithmetic is in float32,
    in float64 for float64 inputs.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dropout = None if dropout_p == 0 else Dropout(dropout_p, seed)
    visible = None if block_mask is None else block_mask.to_dense()
    if cu_seqlens_q is None:
        return _dense(q, k, v, left, right, scale, softcap, bias, alibi_slopes, sinks, dropout, visible)
    assert cu_seqlens_k is not None
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    # An empty sequence first, so that no sequences at all give outputs too, with a gradient.
    out, lse = _dense(q[None, :0], k[None, :0], v[None, :0], left, right, scale, softcap, None, None, None, None, None)
    outs, lses = [out[0]], [lse[0]]
    for b, (q0, q1, k0, k1) in enumerate(zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)):
        bias_b = None if bias is None else _corner(bias, b, q1 - q0, k1 - k0)
        visible_b = None if visible is None else _corner(visible, b, q1 - q0, k1 - k0)
        slopes_b = alibi_slopes if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes[b]
        dropout_b = None if dropout is None else dropout._replace(first_sequence=b)
        rows = (q[None, q0:q1], k[None, k0:k1], v[None, k0:k1])
        out, lse = _dense(*rows, left, right, scale, softcap, bias_b, slopes_b, sinks, dropout_b, visible_b)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def attention_matrix(
    q: Tensor,
    k: Tensor,
    *,
    left: int = -1,
    right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Probabilities (B, H, Tq, Tk) and log-sum-exp (B, H, Tq), both in the dtype of the arithmetic.

    `visible` is a block mask, dense.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = _compute(q), _compute(k)
    group = q.shape[2] // max(k.shape[2], 1)
    logits = scale * torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(group, dim=2))
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    i = torch.arange(q.shape[1], device=q.device)[:, None] + (k.shape[1] - q.shape[1])  # the key that query i sits on
    j = torch.arange(k.shape[1], device=q.device)[None, :]
    if alibi_slopes is not None:
        slopes = _compute(alibi_slopes, like=logits)
        slopes = slopes[None] if slopes.ndim == 1 else slopes
        logits = logits - slopes[:, :, None, None] * (i - j).abs()
    seen = torch.ones_like(i - j, dtype=torch.bool)
    if left >= 0:
        seen = seen & (j >= i - left)
    if right >= 0:
        seen = seen & (j <= i + right)
    if visible is not None:
        seen = seen & visible
    if bias is not None and bias.dtype == torch.bool:
        seen = seen & bias
    elif bias is not None:
        logits = logits + _compute(bias, like=logits)
        # The kernels hold logits in units of log 2: what is -inf there, the lowest number say, hides the key.
        seen = seen & ~(logits <= torch.finfo(logits.dtype).min * math.log(2))
    seen = seen.expand(logits.shape)
    logits = logits.masked_fill(~seen, -math.inf)
    if sinks is not None:
        sink = _compute(sinks, like=logits)[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], dim=-1)
    # A row that sees nothing has lse = -inf. Its logits are replaced before they meet exp and log, so that neither it
    # nor any of its derivatives is NaN. (A float bias of -inf hides a key as a mask does.)
    empty = (logits == -math.inf).all(dim=-1)
    lse = logits.masked_fill(empty[..., None], 0.0).logsumexp(dim=-1) if logits.shape[-1] else logits.sum(-1)
    hidden = logits[..., : k.shape[1]] == -math.inf
    shifted = (logits[..., : k.shape[1]].masked_fill(hidden, 0.0) - lse[..., None]).masked_fill(hidden, -math.inf)
    return shifted.exp(), lse.masked_fill(empty, -math.inf)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout: "Dropout | None",
    visible: Tensor | None,
) -> tuple[Tensor, Tensor]:
    p, lse = attention_matrix(
        q,
        k,
        left=left,
        right=right,
        scale=scale,
        softcap=softcap,
        bias=bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        visible=visible,
    )
    if dropout is not None:
        p = p * dropout.kept(p.shape, p.device) / (1 - dropout.p)
    values = _compute(v).repeat_interleave(q.shape[2] // max(k.shape[2], 1), dim=2)
    return torch.einsum("bhij,bjhd->bihd", p, values).to(q.dtype), lse


class Dropout(NamedTuple):
    """Which probabilities are dropped, p of them, as the seed says; `first_sequence`: the number of the first here."""

    p: float
    seed: int
    first_sequence: int = 0

    def kept(self, shape: Sequence[int], device: torch.device | None = None) -> Tensor:
        """True where a probability stays, of (B, H, Tq, Tk)."""
        batch, heads, tq, tk = shape
        b = self.first_sequence + torch.arange(batch, device=device)[:, None, None, None]
        h = torch.arange(heads, device=device)[:, None, None]
        i = torch.arange(tq, device=device)[:, None]
        words = philox((torch.arange(-(-tk // 4), device=device), i, h, b), self.seed)
        return torch.stack(words, dim=-1).flatten(-2)[..., :tk] >= int(self.p * 2**32)


def philox(counter: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Philox 4x32-10 (Salmon et al., SC 2011): four words of 32 bits, as int64, for each counter of four."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed % 2**32, seed // 2**32
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) % 2**32, (key1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower word of the product of two words. In halves, as its 64 bits do not fit into an int64."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def _corner(bias: Tensor, b: int, tq: int, tk: int) -> Tensor:
    """The part of a packed call's bias, or mask, that sequence b reads."""
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    bias = bias[b : b + 1] if bias.shape[0] > 1 else bias
    bias = bias[:, :, :tq] if bias.shape[2] > 1 else bias
    return bias[..., :tk] if bias.shape[3] > 1 else bias


def _compute(x: Tensor, like: Tensor | None = None) -> Tensor:
    """`x` in the dtype of the arithmetic: float64 stays, everything else becomes float32."""
    dtype = like.dtype if like is not None else torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(dtype)
