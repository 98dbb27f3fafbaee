"""Attention over a cache in Triton: attention's own kernels, told of lengths and pages, after one that appends."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from onchip.ops import _triton
from onchip.ops.attention.outputs import output_like
from onchip.ops.attention.triton import launches
from onchip.ops.attention.triton.arguments import Sequences, along_time
from onchip.ops.attention_with_cache.arguments import Call
from onchip.ops.attention_with_cache.triton import append


@dataclass(frozen=True, kw_only=True)
class CachedCall(launches.Call):
    """A call whose rows hold the keys from `starts`, if given, to `ends`; in the pages of `table`, if given."""

    ends: Tensor
    starts: Tensor | None
    table: Tensor | None

    @cached_property
    def sequences(self) -> Sequences:
        """What each row holds."""
        ends = self.ends.contiguous()
        starts = None if self.starts is None else self.starts.contiguous()
        if self.table is None:
            return Sequences(ends=ends, starts=starts)
        table = self.table if self.table.stride(1) == 1 else self.table.contiguous()
        return Sequences(ends=ends, starts=starts, table=table, line=table.stride(0), page_size=self.k.shape[1])


def forward(call: Call, lengths: list[int] | None) -> tuple[Tensor, Tensor]:
    """The op in Triton; `lengths` are those of `cache_seqlens`, None where they cannot be read."""
    q = call.q if call.rotary_cos is None else call.q.new_empty(call.q.shape)
    out, lse = output_like(q, call.k_cache, call.v_cache, None)
    with _triton.on_device_of(q):
        if call.k is not None and call.v is not None:
            append.launch(call, call.k, call.v, q).run()
        for launch in launches.attend(_cached(call, q, lengths), out, lse):
            launch.run()
    return out, lse


def _cached(call: Call, q: Tensor, lengths: list[int] | None) -> CachedCall:
    if lengths is not None:
        longest = max(lengths, default=0) + call.added
    else:  # as long as a row can be
        longest = call.k_cache.shape[1] * (1 if call.block_table is None else call.block_table.shape[1])
    q, k, v = along_time(q), along_time(call.k_cache), along_time(call.v_cache)
    settings = (call.left, call.right, call.scale, call.softcap, None, call.alibi_slopes, call.sinks, None, None)
    ends = call.cache_seqlens + call.added
    lasting = (q.shape[1], longest), _triton.architecture(q.device)
    leftpad, table = call.cache_leftpad, call.block_table
    invariant = call.batch_invariant
    return CachedCall(q, k, v, *settings, *lasting, batch_invariant=invariant, ends=ends, starts=leftpad, table=table)
