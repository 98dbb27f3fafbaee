"""The launches of attention's passes, from tensors: real ones to run, or on "meta" to compile ahead of time."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from onchip.ops._triton import Launch
from onchip.ops.attention.block_mask import BlockMask
from onchip.ops.attention.triton import bias_gradient, gradients
from onchip.ops.attention.triton.arguments import (
    FAR,
    Bias,
    Factors,
    Features,
    Mask,
    Parts,
    Rows,
    Sequences,
    Terms,
    padded,
    precision,
)
from onchip.ops.attention.triton.attend import attend as attend_kernel
from onchip.ops.attention.triton.attend import combine as combine_kernel
from onchip.ops.attention.triton.blocks import Blocks, Pass, blocks

SPLIT_SIZE = 512  # keys of a split: fixed, so that a row's bits depend neither on the batch nor on the size of the GPU
DECODE_ROWS = 64  # rows of a key head up to which keys are split: with more, the rows make enough programs
ROWS = 64  # of a program that only reads rows once


@dataclass(frozen=True)
class Call:
    """A call to attention, checked; `longest` are the lengths (Tq, Tk) of the longest sequence."""

    q: Tensor
    k: Tensor
    v: Tensor
    left: int
    right: int
    scale: float
    softcap: float
    bias: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    longest: tuple[int, int]
    architecture: str
    dropout_p: float = 0.0
    seed: int = 0
    block_mask: BlockMask | None = None
    batch_invariant: bool = False

    @property
    def heads(self) -> int:
        """Of q."""
        return self.q.shape[-2]

    @property
    def heads_kv(self) -> int:
        """Of k and v."""
        return self.k.shape[-2]

    @property
    def batch(self) -> int:
        """How many sequences."""
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @cached_property
    def features(self) -> Features:
        """What the kernels are compiled for."""
        head_dim, value_dim = self.q.shape[-1], self.v.shape[-1]
        return Features(
            group=1 if self.block_mask is not None else self.heads // self.heads_kv,
            head_dim=head_dim,
            head_width=padded(head_dim),
            value_dim=value_dim,
            value_width=padded(value_dim),
            left=self.left >= 0,
            right=self.right >= 0,
            softcap=self.softcap > 0,
            folded=self.scale > 0 and self.softcap == 0 and self.bias is None and self.alibi_slopes is None,
            precision=precision(self.q.dtype),
            dropout=self.dropout_p > 0,
            block=0 if self.block_mask is None else self.block_mask.block,
            shared=1 if self.block_mask is None else self.heads // self.heads_kv,
        )

    @property
    def shared(self) -> tuple[Any, ...]:
        """What every kernel takes besides its tensors: lengths, the window's reach, factors, features."""
        window = (min(self.left, FAR), min(self.right, FAR))
        return (*self.longest, *window, Factors.of(self.scale, self.softcap, self.dropout_p, self.seed), self.features)

    @property
    def terms(self) -> Terms:
        """What is added to the logits."""
        return Terms.of(self.bias, self.alibi_slopes, self.sinks)

    @property
    def groups(self) -> int:
        """Of heads whose queries make up the rows of a tile."""
        return self.heads // self.features.group

    @property
    def masks(self) -> tuple[Mask, Mask]:
        """The block mask's lists by query and by key."""
        x = self.block_mask
        if x is None:
            return Mask(), Mask()
        tiles_q, tiles_k = x.by_query.starts.shape[2] - 1, x.by_key.starts.shape[2] - 1
        return Mask.of(x.by_query, x.bits, tiles_k), Mask.of(x.by_key, x.bits, tiles_q)

    @property
    def sequences(self) -> Sequences:
        """Where packed sequences begin."""
        return Sequences.of(self.cu_seqlens_q, self.cu_seqlens_k)

    def blocks(self, of: Pass) -> Blocks:
        """The tile of a pass."""
        features = self.features
        head_dim = max(features.head_dim, features.value_dim)
        terms = features.softcap or self.bias is not None or self.alibi_slopes is not None or features.block > 0
        terms = terms or features.dropout or self.batch_invariant  # which takes a second accumulator
        shape = blocks(self.architecture, of, head_dim, self.q.itemsize, terms=terms)
        if features.block > 0:
            shape = shape._replace(rows=min(shape.rows, features.block), keys=min(shape.keys, features.block))
        return shape

    def slots(self, x: Tensor, per_time: int, block: int) -> tuple[int, int]:
        """How many tiles the rows of `x` make: of one sequence (of all, where packed), and of all."""
        if self.cu_seqlens_q is not None:
            slots = x.shape[0] * per_time // block + self.batch
            return slots, slots
        slots = -(-x.shape[1] * per_time // block)
        return slots, slots * self.batch


def attend(call: Call, out: Tensor, lse: Tensor) -> list[Launch]:
    """The forward pass. Few rows and many keys are shared out by keys: the parts are combined afterwards.

    Where the call is batch-invariant all rows are made of such parts, combined where they arise if there are many rows,
    and all tiles are of one shape.
    """
    tq, tk = call.longest
    few = tq * call.features.group <= DECODE_ROWS
    shape = call.blocks("decode" if few and not call.batch_invariant else "forward")
    splits = -(-tk // SPLIT_SIZE) if few else 1
    if splits <= 1:
        return [_attend(call, Rows.of(out), Rows.of_lse(lse), 1, shape)]
    parts = out.new_empty((splits, *out.shape), dtype=torch.float32)
    parts_lse = out.new_empty((splits, *out.shape[:-1]), dtype=torch.float32)
    packed = (0,) if call.cu_seqlens_q is not None else ()
    into = (
        Parts(parts, parts.stride(0), *packed, *parts.stride()[1:-1]),
        Parts(parts_lse, parts_lse.stride(0), *packed, *parts_lse.stride()[1:]),
    )
    combine = Launch(
        combine_kernel,
        (-(-lse.numel() // ROWS),),
        (*into, Rows.of(out), Rows.of_lse(lse), lse.numel(), splits, *_heads_and_times(call), call.features, ROWS),
    )
    return [_attend(call, *into, splits, shape), combine]


def _attend(call: Call, out: Rows | Parts, lse: Rows | Parts, splits: int, shape: Blocks) -> Launch:
    slots, all_slots = call.slots(call.q, call.features.group, shape.rows)
    *sizes, factors, features = call.shared
    arguments = (
        *(Rows.of(x) for x in (call.q, call.k, call.v)), out, lse, *call.terms, call.sequences,
        call.masks[0], slots, call.groups, *sizes, splits, SPLIT_SIZE,
        factors, features, shape.rows, shape.keys, splits > 1, call.batch_invariant,
    )  # fmt: skip
    return Launch(attend_kernel, (all_slots * call.groups * splits,), arguments, shape.warps, shape.stages)


def deltas(call: Call, out: Tensor, grad_out: Tensor, grad_lse: Tensor | None, delta: Tensor) -> Launch:
    """What every gradient needs of each row."""
    views = (Rows.of(out), Rows.of(grad_out), Rows.of_lse(grad_lse), Rows.of_lse(delta))
    arguments = (*views, delta.numel(), *_heads_and_times(call), call.features, ROWS)
    return Launch(gradients.deltas, (-(-delta.numel() // ROWS),), arguments)


@dataclass(frozen=True)
class Saved:
    """What the gradients are computed from, besides the call."""

    grad_out: Tensor
    lse: Tensor
    delta: Tensor

    @property
    def views(self) -> tuple[Rows, Rows, Rows]:
        """As the kernels take them."""
        return Rows.of(self.grad_out), Rows.of_lse(self.lse), Rows.of_lse(self.delta)


def keys_and_values(call: Call, saved: Saved, grad_k: Tensor, grad_v: Tensor) -> Launch:
    """The gradients of k and v."""
    shape = call.blocks("keys")
    slots, all_slots = call.slots(call.k, 1, shape.keys)
    arguments = (
        *(Rows.of(x) for x in (call.q, call.k, call.v)), *saved.views, Rows.of(grad_k), Rows.of(grad_v),
        *call.terms, call.sequences, call.masks[1], slots, call.heads_kv, *call.shared, shape.rows, shape.keys,
    )  # fmt: skip
    return Launch(gradients.keys_and_values, (all_slots * call.heads_kv,), arguments, shape.warps, shape.stages)


def queries(call: Call, saved: Saved, grad_q: Tensor, grad_slopes: Tensor | None) -> Launch:
    """The gradient of q, and per row that of its slope."""
    shape = call.blocks("queries")
    slots, all_slots = call.slots(call.q, call.features.group, shape.rows)
    arguments = (
        *(Rows.of(x) for x in (call.q, call.k, call.v)), *saved.views,
        Rows.of(grad_q), Rows.of_lse(grad_slopes),
        *call.terms, call.sequences, call.masks[0], slots, call.groups, *call.shared, shape.rows, shape.keys,
    )  # fmt: skip
    return Launch(gradients.queries, (all_slots * call.groups,), arguments, shape.warps, shape.stages)


def bias(call: Call, saved: Saved, grad: Tensor, *, per_query: bool, per_key: bool) -> Launch:
    """The gradient of the bias into `grad`, (B or 1, H or 1, Tq or 1, Tk or 1) in float32."""
    shape = call.blocks("bias")
    own_batch, own_heads = grad.shape[:2]
    tq, tk = call.longest
    tiles = (-(-tq // shape.rows) if per_query else 1) * (-(-tk // shape.keys) if per_key else 1)
    arguments = (
        *(Rows.of(x) for x in (call.q, call.k, call.v)), *saved.views, Bias.of(grad), *call.terms, call.sequences,
        call.masks[0], call.batch, call.heads, own_batch, own_heads, *call.shared, shape.rows, shape.keys,
        per_query, per_key,
    )  # fmt: skip
    return Launch(bias_gradient.grad_bias, (tiles * own_batch * own_heads,), arguments, shape.warps, shape.stages)


def _heads_and_times(call: Call) -> tuple[int, int]:
    return call.heads, call.q.shape[-3]
