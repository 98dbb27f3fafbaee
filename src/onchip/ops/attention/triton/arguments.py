"""What the kernels are given: tensors as pointers with strides, and what is known when they are compiled.

An absent tensor is a pointer of None: Triton 3.6 cannot compare a tuple with None.

A kernel's rows are the queries of all heads that share a key head: row r is query r // group of head r % group of the
group. One tile so serves a whole group, which is what fills it in decoding.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onchip.ops.attention.block_mask import Lists

FAR = 1 << 30  # a window's reach beyond any sequence, and positions may be added to it


class Rows(NamedTuple):
    """A `(B, T, H, D)` or `(total, H, D)` tensor whose last dimension is contiguous, or one of `(B, H, T)`."""

    ptr: Any = None
    batch: int = 0
    time: int = 0
    head: int = 0

    @classmethod
    def of(cls, x: Tensor) -> "Rows":
        """Of a tensor with a last dimension; `along_time` makes sure that it is contiguous."""
        return cls(x, *(x.stride()[:3] if x.ndim == 4 else (0, *x.stride()[:2])))

    @classmethod
    def of_lse(cls, x: Tensor | None) -> "Rows":
        """Of a `(B, H, T)` or `(H, total)` tensor."""
        if x is None:
            return cls()
        batch, head, time = x.stride() if x.ndim == 3 else (0, *x.stride())
        return cls(x, batch, time, head)


class Parts(NamedTuple):
    """`Rows` once for every split of the keys."""

    ptr: Any
    split: int
    batch: int
    time: int
    head: int


class Bias(NamedTuple):
    """The bias; stride 0 where one element serves all."""

    ptr: Any = None
    batch: int = 0
    head: int = 0
    query: int = 0
    key: int = 0

    @classmethod
    def of(cls, x: Tensor | None) -> "Bias":
        """Of a tensor broadcastable to four dimensions."""
        if x is None:
            return cls()
        x = x[(None,) * (4 - x.ndim)]
        return cls(x, *(0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True)))


class Slopes(NamedTuple):
    """ALiBi's slopes, `(B, H)` or, with stride 0, `(H,)`."""

    ptr: Any = None
    batch: int = 0
    head: int = 0

    @classmethod
    def of(cls, x: Tensor | None) -> "Slopes":
        """Of the slopes."""
        if x is None:
            return cls()
        return cls(x, *(x.stride() if x.ndim == 2 else (0, x.stride(0))))


class Terms(NamedTuple):
    """What is added to the logits; a pointer is None where it is absent."""

    bias: Bias
    slopes: Slopes
    sinks: Any

    @classmethod
    def of(cls, bias: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None) -> "Terms":
        """Of the tensors that `onchip.attention` takes."""
        return cls(Bias.of(bias), Slopes.of(alibi_slopes), None if sinks is None else sinks.contiguous())


class Sequences(NamedTuple):
    """Where packed sequences begin, if they are: `steps` halvings find one among them.

    Or which keys of a cache each row holds: from `starts (B,)`, by default 0, to `ends (B,)`; and where they lie, in
    pages of `page_size` keys, the `table` of them, `line` entries a row.
    """

    cu_q: Any = None
    cu_k: Any = None
    batch: int = 0
    steps: int = 0
    ends: Any = None
    starts: Any = None
    table: Any = None
    line: int = 0
    page_size: int = 0

    @classmethod
    def of(cls, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> "Sequences":
        """Of the boundaries."""
        if cu_seqlens_q is None or cu_seqlens_k is None:
            return cls()
        batch = cu_seqlens_q.shape[0] - 1
        return cls(cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), batch, batch.bit_length())


class Mask(NamedTuple):
    """The lists of a block mask along one axis, and its bits; stride 0 where one list serves all.

    `steps` halvings find a tile on any list.
    """

    starts: Any = None
    entries: Any = None
    bits: Any = None
    batch: int = 0
    head: int = 0
    steps: int = 0

    @classmethod
    def of(cls, lists: Lists, bits: Tensor, others: int) -> "Mask":
        """Of lists on which stand up to so many tiles."""
        strides = (0 if n == 1 else stride for n, stride in zip(lists.starts.shape, lists.starts.stride(), strict=True))
        batch, head, _ = strides
        return cls(*lists, bits, batch, head, others.bit_length())


class Features(NamedTuple):
    """What is known when a kernel is compiled.

    The widths are those of the tiles that hold the head dims. `left` and `right`: whether the window ends there.
    `softcap`, `dropout`: whether there is any. `folded`: whether the factor of q·k, being positive and all that happens
    to it, waits until the exponential. `precision`: of products in float32. `block`: of the block mask, 0 without one;
    with one a tile's rows are queries of one head, so that the group is of one, and `shared` heads have the same keys.
    """

    group: int
    head_dim: int
    head_width: int
    value_dim: int
    value_width: int
    left: bool
    right: bool
    softcap: bool
    folded: bool
    precision: str
    dropout: bool = False
    block: int = 0
    shared: int = 1


class Factors(NamedTuple):
    """Numbers that multiply: logits are held in units of log 2, so that their exponential is exp2.

    And dropout's: what is kept is multiplied by `kept`; the threshold and the seed's words, of 32 bits, come as
    `_wrapped` has them.
    """

    scale: float
    logit: float
    inner: float
    outer: float
    kept: float
    threshold: int
    seed_low: int
    seed_high: int

    @classmethod
    def of(cls, scale: float, softcap: float, dropout_p: float, seed: int) -> "Factors":
        """`inner` is of q·k inside tanh, `outer` of tanh, `logit` of q·k where there is no softcap."""
        of_logits = (scale, scale * LOG2E, scale / softcap if softcap else 0.0, softcap * LOG2E)
        words = (_wrapped(int(dropout_p * 2**32)), _wrapped(seed % 2**32), _wrapped(seed // 2**32))
        return cls(*of_logits, 1 / (1 - dropout_p), *words)


LOG2E = math.log2(math.e)


def _wrapped(word: int) -> int:
    """Odd and above 2³²: for a 1, a multiple of 16 or another width Triton would compile the kernel anew."""
    return 2**34 + 2 * word + 1


def along_time(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension, as tiles are loaded; a copy where it has another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def padded(dim: int) -> int:
    """The width of a tile that holds `dim`: a power of two that the matrix units take."""
    return max(16, 1 << (dim - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """How matrix units multiply float32: exactly, or in TF32 where PyTorch's own products may."""
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
