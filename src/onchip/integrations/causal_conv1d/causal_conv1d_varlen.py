"""The states of packed sequences, as causal-conv1d's module of this name has it."""

from torch import Tensor

from onchip.ops._count import check_count
from onchip.ops._sequence import boundaries, check_boundaries, check_tensor
from onchip.ops.causal_conv1d.outputs import final_state

__all__ = ["causal_conv1d_varlen_states"]


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last `state_len` inputs of each of the packed sequences, after zeros where a sequence is shorter.

    Args:
        x: `(total, D)`.
        cu_seqlens: `(sequences + 1,)` int32 or int64, from 0 to total.
        state_len: at least 0.

    Returns:
        `(sequences, D, state_len)`, contiguous along channels; differentiable, which causal-conv1d's is not.

    Raises:
        ValueError: shapes or values that do not fit, naming the argument, what was expected and what came.
        TypeError: dtypes or devices that do not fit.

    >>> import torch
    >>> x = torch.arange(1.0, 6.0)[:, None]
    >>> causal_conv1d_varlen_states(x, torch.tensor([0, 1, 5]), 3)[:, 0]
    tensor([[0., 0., 1.],
            [3., 4., 5.]])
    """
    check_tensor("x", x, ("total", "D"), x, any_float=False)
    check_boundaries(cu_seqlens, x)
    check_count("state_len", state_len)
    boundaries(cu_seqlens, x.shape[0])
    return final_state(x, None, state_len + 1, cu_seqlens).transpose(1, 2)
