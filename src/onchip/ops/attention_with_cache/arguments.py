"""A call to attention over a cache, checked, as the implementations take it."""

from typing import NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """The registered op's arguments in the order of its schema; `left` and `right` are -1 where unbounded."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None
    v: Tensor | None
    cache_seqlens: Tensor
    cache_leftpad: Tensor | None
    block_table: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_seqlens: Tensor | None
    rotary_interleaved: bool
    left: int
    right: int
    scale: float
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    batch_invariant: bool

    @property
    def added(self) -> int:
        """How many keys are appended to each row."""
        return 0 if self.k is None else self.k.shape[1]

    @property
    def rotary(self) -> tuple[Tensor, Tensor] | None:
        """The tables (cos, sin)."""
        return None if self.rotary_cos is None or self.rotary_sin is None else (self.rotary_cos, self.rotary_sin)

    @property
    def in_order(self) -> bool:
        """Whether query i is turned by position `cache_seqlens + i`: where any mask orders the queries."""
        return self.left >= 0 or self.right >= 0
