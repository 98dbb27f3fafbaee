"""The definition of attention over a cache: the new keys into it, then each row against the keys it holds."""

import torch
from torch import Tensor

from onchip.ops.attention import reference
from onchip.ops.attention.outputs import output_like
from onchip.ops.attention_with_cache.append import append, slots
from onchip.ops.attention_with_cache.arguments import Call


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Attention over the cache and its log-sum-exp, one row after the other."""
    q, k_cache, v_cache = call.q, call.k_cache, call.v_cache
    if call.k is not None and call.v is not None:
        q = append(
            q, k_cache, v_cache, call.k, call.v, call.cache_seqlens, call.block_table, call.rotary,
            call.rotary_seqlens, interleaved=call.rotary_interleaved, in_order=call.in_order,
        )  # fmt: skip
    out, lse = output_like(q, k_cache, v_cache, None)
    lengths = (call.cache_seqlens + call.added).tolist()
    starts = [0] * len(lengths) if call.cache_leftpad is None else call.cache_leftpad.tolist()
    for b, (start, stop) in enumerate(zip(starts, lengths, strict=True)):
        table = None if call.block_table is None else call.block_table[b : b + 1]
        cache = (k_cache, v_cache) if table is not None else (k_cache[b : b + 1], v_cache[b : b + 1])
        places = slots(torch.arange(start, stop, device=q.device)[None], table, k_cache.shape[1])
        slopes = call.alibi_slopes
        out[b : b + 1], lse[b : b + 1] = reference.attention_with_lse(
            q[b : b + 1],
            *(x[places] for x in cache),
            left=call.left,
            right=call.right,
            scale=call.scale,
            softcap=call.softcap,
            alibi_slopes=slopes if slopes is None or slopes.ndim == 1 else slopes[b : b + 1],
            sinks=call.sinks,
        )
    return out, lse
