"""Attention over a cache on the native CPU kernels: one call appends, turns and attends."""

import torch
from torch import Tensor

from onchip.ops import _native
from onchip.ops.attention.cpu import describe_inputs, describe_rows, describe_table
from onchip.ops.attention.outputs import output_like
from onchip.ops.attention_with_cache.arguments import Call


def forward(
    call: Call, lengths: list[int], starts: list[int] | None, positions: list[int] | None
) -> tuple[Tensor, Tensor]:
    """The op on the CPU; with the values of `cache_seqlens`, `cache_leftpad` and `rotary_seqlens`."""
    q, k, v, added = call.q, call.k_cache, call.v_cache, call.added
    out, lse = output_like(q, k, v, None)
    turned = q if call.rotary_cos is None else torch.empty_like(q, memory_format=torch.contiguous_format)
    tensors, _kept = describe_inputs(turned, k, v, out, lse, None, call.alibi_slopes, call.sinks)
    batch, tq, heads, head_dim = q.shape
    threads = torch.get_num_threads()
    sizes = (
        batch,
        tq,
        0,
        heads,
        k.shape[2],
        head_dim,
        v.shape[3],
        call.left,
        call.right,
        threads,
        call.batch_invariant,
    )
    if starts is None:
        held = [0] * batch, [n + added for n in lengths] if added else lengths
    else:
        held = starts, [n + added - start for n, start in zip(lengths, starts, strict=True)]
    table = call.block_table
    if table is not None and table.stride(1) != 1:
        table = table.contiguous()
    pages = (0, 0, 0) if table is None else (table.data_ptr(), table.stride(0), k.shape[1])
    appended = _appended(call, added, positions or [])
    _native.kernels.attention_with_cache(sizes, call.scale, call.softcap, held, pages, appended, tensors)
    return out, lse


_Appended = tuple[tuple[int, ...], tuple[tuple[int, ...] | None, ...], list[int]]
_NOTHING: _Appended = ((0, 0, 0, 0), (None,) * 5, [])


def _appended(call: Call, added: int, positions: list[int]) -> _Appended:
    if call.k is None or call.v is None:
        return _NOTHING
    k, v = describe_rows(call.k), describe_rows(call.v)
    if call.rotary_cos is None or call.rotary_sin is None:
        return (added, 0, 0, 0), (k, v, None, None, None), []
    settings = (added, call.rotary_cos.shape[1], int(call.rotary_interleaved), int(call.in_order))
    tables = describe_table(call.rotary_cos), describe_table(call.rotary_sin)
    return settings, (k, v, describe_rows(call.q), *tables), positions
