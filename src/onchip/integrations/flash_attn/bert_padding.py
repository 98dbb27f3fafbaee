"""Padded batches to packed rows and back, as flash-attn's module of this name has it."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["index_first_axis", "index_put_first_axis", "pad_input", "unpad_input"]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows `indices` of `input`; differentiable in input.

    >>> import torch
    >>> index_first_axis(torch.tensor([[1], [2], [3]]), torch.tensor([2, 0])).tolist()
    [[3], [1]]
    """
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """A tensor of `first_axis_dim` rows that holds `values` at the rows `indices`, each at most once, and zeros.

    >>> import torch
    >>> index_put_first_axis(torch.tensor([[3], [1]]), torch.tensor([2, 0]), 4).tolist()
    [[1], [0], [3], [0]]
    """
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The rows of a padded batch that are in use, one sequence after the other.

    Args:
        hidden_states: `(B, T, …)`.
        attention_mask: `(B, T)`, boolean or integer, 1 where a token is in use.
        unused_mask: `(B, T)`, 1 where a token is to be kept though it is not in use; nowhere by default.

    Returns:
        The rows `(total, …)`, their indices in the flattened batch, `cu_seqlens` `(B + 1,)` int32, the longest length
        as a Python integer, and how many tokens are in use in each sequence, `(B,)` int32.

    >>> import torch
    >>> x, mask = torch.arange(6).reshape(2, 3, 1), torch.tensor([[1, 1, 0], [1, 1, 1]])
    >>> rows, indices, cu_seqlens, longest, used = unpad_input(x, mask)
    >>> rows.flatten().tolist(), cu_seqlens.tolist(), longest
    ([0, 1, 3, 4, 5], [0, 2, 5], 3)
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths, used = (mask.sum(-1, dtype=torch.int32) for mask in (kept, attention_mask))
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, int(lengths.max()), used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """`unpad_input` undone: `(B, T, …)`, with zeros where there was no row.

    >>> import torch
    >>> pad_input(torch.tensor([[7], [8]]), torch.tensor([0, 3]), batch=2, seqlen=2).squeeze(-1).tolist()
    [[7, 0], [0, 8]]
    """
    return index_put_first_axis(hidden_states, indices, batch * seqlen).view(batch, seqlen, *hidden_states.shape[1:])
