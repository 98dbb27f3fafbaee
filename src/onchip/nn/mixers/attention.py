"""Softmax attention as a mixer, and the cache of keys and values that it carries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from onchip.nn.linear import Linear
from onchip.nn.mixers.base import Mixer, State
from onchip.nn.rotary import RotaryScaling, packed_positions, rotary_table, rotate
from onchip.ops import attention, attention_with_cache
from onchip.ops._count import check_count, check_sizes
from onchip.ops._read import known
from onchip.ops.attention.reference import attention_matrix

_SPARE = 16  # columns of room that even a short cache has


@dataclass
class _Fill:
    """How many columns of a cache are written. Shared by the states that share the cache."""

    columns: int


@dataclass(frozen=True, eq=False)
class AttentionState(State):
    """The keys, already rotated, and the values that the next queries can see.

    Rows are aligned at their last token: column `end - 1` of `keys (B, capacity, Hk, D)` and `values` holds every row's
    newest key, whatever the rows' lengths, so that a new token is written to one column of all rows. `position` is
    the number of tokens that the longest row has seen, `behind (B,)` how many fewer each row has; None where all are
    equal. Under a window, columns that no later query can see are dropped, and `end` stays behind `position`.

    The cache has room to spare: a step writes one column and copies nothing but when the room is used up. A state is
    nevertheless a value: only the first of several continuations writes in place, the others copy. So do all where
    gradients are recorded: autograd may hold the cache that is. `behind` is on the CPU, which sets out what is to be
    done.
    """

    keys: Tensor
    values: Tensor
    end: int = 0
    position: int = 0
    behind: Tensor | None = None
    _fill: _Fill = field(default_factory=lambda: _Fill(0), repr=False, compare=False)

    def joined(self, k: Tensor, v: Tensor) -> Self:
        """The state with the keys `k (B, T, Hk, D)` and values `v` after its own, in a new cache."""
        keys, values = k, v
        if self.end:
            keys, values = (torch.cat([x[:, : self.end], new], 1) for x, new in ((self.keys, k), (self.values, v)))
        end = keys.shape[1]
        return replace(self, keys=keys, values=values, end=end, position=self.position + k.shape[1], _fill=_Fill(end))

    def extended(self, k: Tensor, v: Tensor, reach: int | None) -> Self:
        """The state after the tokens of `k` and `v`, into whose last columns they are still to be written.

        At least `reach` of the columns before are in it.
        """
        T = k.shape[1]
        if self._may_write(T):
            self._fill.columns += T
            return replace(self, end=self.end + T, position=self.position + T)
        start = 0 if reach is None else max(self.end - reach, 0)
        end = self.end - start + T
        keys, values = (_with_room(x[:, start : self.end], new) for x, new in ((self.keys, k), (self.values, v)))
        return replace(self, keys=keys, values=values, end=end, position=self.position + T, _fill=_Fill(end))

    def last(self, reach: int) -> Self:
        """The state without the columns before the last `reach`, once dropping them frees more than half."""
        if self.end <= 2 * reach + _SPARE:
            return self
        keys, values = (x[:, self.end - reach : self.end] for x in (self.keys, self.values))
        if not torch.is_grad_enabled():
            keys, values = keys.clone(), values.clone()
        return replace(self, keys=keys, values=values, end=reach, _fill=_Fill(reach))

    def seen(self) -> Tensor:
        """How many tokens each row has seen, `(B,)`, on the CPU."""
        rows = torch.full(self.keys.shape[:1], self.position, device="cpu")
        return rows if self.behind is None else rows - self.behind

    def pads(self) -> Tensor | None:
        """How many of its first columns hold no key in each row, `(B,)`; None where all do."""
        return None if self.behind is None else known((self.end - self.seen()).clamp(min=0), self.keys)

    def positions(self, T: int) -> Tensor | None:
        """The position of the first of each row's last T tokens, `(B,)`; None where all have the same."""
        return None if self.behind is None else known(self.seen() - T, self.keys)

    def reorder(self, index: Tensor) -> Self:
        """Row i of the result is row `index[i]`; rows may be dropped and repeated. `index (N,)` int64."""
        keys, values = (x[:, : self.end].index_select(0, index) for x in (self.keys, self.values))
        behind, position = None if self.behind is None else self.behind[index.cpu()], self.position
        if behind is not None and len(behind):
            # The rows that were ahead may be gone.
            ahead = int(behind.min())
            behind, position = (behind - ahead if bool((behind > ahead).any()) else None), position - ahead
            unused = max(self.end - position, 0)
            keys, values = keys[:, unused:], values[:, unused:]
        end = keys.shape[1]
        return replace(self, keys=keys, values=values, end=end, position=position, behind=behind, _fill=_Fill(end))

    @classmethod
    def stack(cls, states: Sequence[Self]) -> Self:
        """One state with the rows of all `states`, in order; they may have seen different numbers of tokens."""
        end, position = max(state.end for state in states), max(state.position for state in states)
        keys = torch.cat([_right_aligned(state.keys[:, : state.end], end) for state in states])
        values = torch.cat([_right_aligned(state.values[:, : state.end], end) for state in states])
        if all(state.position == position and state.behind is None for state in states):
            behind = None
        else:
            behind = position - torch.cat([state.seen() for state in states])
        return cls(keys, values, end, position, behind, _Fill(end))

    def _may_write(self, T: int) -> bool:
        return (
            self._fill.columns == self.end  # else another continuation has written here
            and self.end + T <= self.keys.shape[1]
            and (torch.is_inference_mode_enabled() or not self.keys.is_inference())
        )


def _with_room(old: Tensor, new: Tensor) -> Tensor:
    """`old` with room after it for `new`, and for half as many again."""
    end = old.shape[1] + new.shape[1]
    room = new.new_empty(new.shape[0], end + end // 2 + _SPARE, *new.shape[2:])
    room[:, : old.shape[1]] = old
    return room


def _right_aligned(x: Tensor, end: int) -> Tensor:
    return torch.cat([x.new_zeros(x.shape[0], end - x.shape[1], *x.shape[2:]), x], dim=1)


class Attention(Mixer[AttentionState]):
    """Multi-head softmax attention with rotary embedding, grouped-query heads, a window and sinks.

    For head h with query position i and key position j, all projections of `x (B, T, d_model)`:

        M[i, j] = exp(q[i]·k[j] / √head_dim) / (exp(sink) + Σ_j' exp(q[i]·k[j'] / √head_dim))
        y[i]    = out(concat over heads of Σ_j M[i, j] · v[j])

    with q and k rotated by their positions, which count from 0 in every sequence.

    Args:
        d_model: features in and out.
        n_heads: query heads.
        n_kv_heads: heads of keys and values, a divisor of `n_heads`; by default `n_heads`.
        head_dim: features per head, even unless `rope_base` is None; by default d_model / n_heads.
        causal: query i sees keys j ≤ i alone. Without it there is neither a chunked nor a step form.
        window: `(left, right)`: query i sees keys i - left ≤ j ≤ i + right; None on a side for no limit there.
        sinks: one learnable logit per head that takes probability and gives no value, at first 0. (The plain softmax
            is the sink at -∞.)
        rope_base: longest wavelength of the rotary embedding, over 2π; None for no embedding of positions.
        rope_scaling: the fields of `onchip.nn.rotary.RotaryScaling`, for a context stretched as in Llama 3.
        bias: whether the projections have biases; "qkv" for those into queries, keys and values alone.

    Raises:
        TypeError: a size or a side of the window that is no integer.
        ValueError: head counts or dims that do not fit together; a negative window; a scaling without an embedding to
            scale; a `bias` that is none of the three.

    The state holds the keys and values of all tokens, `2·n_kv_heads·head_dim` numbers each; under a causal window, of
    about the last 1.5·left tokens.

    Cost: 4·T²·n_heads·head_dim operations on top of the projections, half when causal; memory linear in T, except
    for `matrix`.

    Source: Vaswani et al. (arXiv 1706.03762); Su et al., RoFormer (arXiv 2104.09864); Ainslie et al., GQA (arXiv
    2305.13245). The sinks are those of gpt-oss: learned logits, not kept tokens.

    >>> import torch
    >>> mixer = Attention(64, n_heads=8, n_kv_heads=2, window=(15, 0))
    >>> x = torch.randn(2, 10, 64)
    >>> y = mixer(x)
    >>> head, state = mixer(x[:, :6], mixer.initial_state(batch=2))
    >>> tail, state = mixer(x[:, 6:], state)
    >>> torch.allclose(torch.cat([head, tail], dim=1), y, atol=1e-6)
    True
    """

    state_type = AttentionState

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        window: Sequence[int | None] | None = None,
        sinks: bool = False,
        rope_base: float | None = 10_000.0,
        rope_scaling: Mapping[str, float] | None = None,
        bias: bool | Literal["qkv"] = False,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        check_sizes(
            d_model=d_model, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=1 if head_dim is None else head_dim
        )
        if n_heads % n_kv_heads:
            raise ValueError(f"n_heads must be a multiple of n_kv_heads, got {n_heads} and {n_kv_heads}")
        if head_dim is None and d_model % n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads, or head_dim given, got {d_model} and {n_heads}")
        if bias not in (True, False, "qkv"):
            raise ValueError(f'bias must be true, false or "qkv", got {bias!r}')
        if rope_base is None and rope_scaling is not None:
            raise ValueError("rope_base must be given where rope_scaling is, got None")
        left, right = _reaches(window)
        self.d_model, self.n_heads, self.n_kv_heads = d_model, n_heads, n_kv_heads
        self.head_dim = d_model // n_heads if head_dim is None else head_dim
        self.window = (left, 0 if causal else right)
        self.causal = self.window[1] == 0
        scaling = None if rope_scaling is None else RotaryScaling.of(rope_scaling)
        self.rotary = None if rope_base is None else rotary_table(self.head_dim, rope_base, scaling)
        self.qkv = Linear(d_model, (n_heads + 2 * n_kv_heads) * self.head_dim, bias=bool(bias))
        self.out = Linear(n_heads * self.head_dim, d_model, bias=bias is True)
        self.sinks = nn.Parameter(torch.zeros(n_heads)) if sinks else None

    def initial_state(self, batch: int) -> AttentionState:
        """The state of `batch` sequences before their first token."""
        if not self.causal:
            raise self._missing("state")
        empty = self.qkv.weight.new_empty(batch, 0, self.n_kv_heads, self.head_dim)
        return AttentionState(empty, empty)

    def matrix(self, x: Tensor) -> Tensor:
        """The attention probabilities `(B, H, T, T)`; a row sums to 1, less with sinks. Memory quadratic in T."""
        q, k, _ = self._project(x, slice(x.shape[1]), x.shape[1])
        left, right = (-1 if reach is None else reach for reach in self.window)
        return attention_matrix(q, k, left=left, right=right, sinks=self.sinks)[0]

    def apply_matrix(self, x: Tensor, matrix: Tensor) -> Tensor:
        """`mixer(x)` with `matrix (B, H, T, T)` in place of the probabilities."""
        v = self._project(x, slice(x.shape[1]), x.shape[1])[2].repeat_interleave(self.n_heads // self.n_kv_heads, dim=2)
        return self._merge(torch.einsum("bhij,bjhd->bihd", matrix.to(v.dtype), v))

    def _parallel(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        T = x.shape[-2]
        q, k, v = self._project(x, slice(T) if cu_seqlens is None else packed_positions(cu_seqlens, T), T)
        return self._merge(attention(q, k, v, window=self.window, sinks=self.sinks, cu_seqlens_q=cu_seqlens))

    def _chunk(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        if x.shape[0] != state.keys.shape[0]:
            raise ValueError(f"the state has {state.keys.shape[0]} rows, the input {x.shape[0]}")
        y, state = (self._recorded if torch.is_grad_enabled() else self._in_place)(x, state)
        return self._merge(y), state if self.window[0] is None else state.last(self.window[0])

    def _recorded(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        positions = state.seen()[:, None] + torch.arange(x.shape[1], device="cpu")
        q, k, v = self._project(x, positions, state.position + x.shape[1])
        state = state.joined(k, v)
        pads, column = state.pads(), torch.arange(state.end, device=x.device)
        held = None if pads is None else (column >= pads[:, None])[:, None, None]
        return attention(q, state.keys, state.values, window=self.window, sinks=self.sinks, bias=held), state

    def _in_place(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        B, T, _ = x.shape
        q, k, v = self._project(x, None)
        state = state.extended(k, v, self.window[0])
        rotary: dict[str, Any] = {}
        if self.rotary is not None:
            dropped = state.position - state.end if state.behind is None else 0
            turns = self.rotary(state.position, like=q)[dropped:]
            rotary = {"rotary": (turns.select(-1, 0), turns.select(-1, 1)), "rotary_seqlens": state.positions(T)}
        held = known(torch.full((B,), state.end - T, device="cpu"), x)
        y = attention_with_cache(
            q, state.keys, state.values, k=k, v=v, cache_seqlens=held, cache_leftpad=state.pads(), **rotary,
            window=self.window, sinks=self.sinks,
        )  # fmt: skip
        return y, state

    def _project(self, x: Tensor, positions: Tensor | slice | None, length: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(…, T, H, D)`, keys `(…, T, Hk, D)` and values; rotated by `positions`, below `length`, if given."""
        heads = self.qkv(x).unflatten(-1, (self.n_heads + 2 * self.n_kv_heads, self.head_dim))
        qk, v = heads.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=-2)
        if self.rotary is not None and positions is not None:
            qk = rotate(qk, self.rotary(length, like=qk)[positions])
        q, k = qk.split([self.n_heads, self.n_kv_heads], dim=-2)
        return q, k, v

    def _merge(self, y: Tensor) -> Tensor:
        return cast(Tensor, self.out(y.flatten(-2)))


def _reaches(window: Sequence[int | None] | None) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if len(window) != 2:
        raise ValueError(f"window must be (left, right), each None or not negative, got {window!r}")
    for name, reach in zip(("left", "right"), window, strict=True):
        if reach is not None:
            check_count(f"window's {name}", reach)
    return window[0], window[1]
