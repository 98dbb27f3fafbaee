"""What a call to the causal convolution must satisfy, and the sentences that say so when it does not."""

from typing import Literal

from torch import Tensor

from onchip.ops._count import check_count
from onchip.ops._sequence import check_boundaries, check_tensor

Activation = Literal["silu", "swish"] | None


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> bool:
    """The arguments fit each other; whether there is an activation."""
    packed = cu_seqlens is not None
    check_tensor("x", x, ("total", "D") if packed else ("B", "T", "D"), x, any_float=False)
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, x)
    width = check_filter(x, weight, bias, x.shape[-1])
    if initial_state is not None:
        batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_tensor("initial_state", initial_state, (batch, width - 1, x.shape[-1]), x, any_float=False)
    return check_activation(activation)


def check_step(
    x_t: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    out_state: Tensor | None,
) -> bool:
    """The arguments of a step fit each other; whether there is an activation."""
    check_tensor("x_t", x_t, ("B", "D"), x_t, any_float=False)
    shape = (x_t.shape[0], check_filter(x_t, weight, bias, x_t.shape[1]) - 1, x_t.shape[1])
    check_tensor("state", state, shape, x_t, any_float=False)
    if out_state is not None:
        check_tensor("out_state", out_state, shape, x_t, any_float=False)
    return check_activation(activation)


def check_matrix(weight: Tensor, length: int) -> None:
    """These are a filter and a length."""
    check_tensor("weight", weight, ("D", "W"), weight, any_float=True)
    _check_width(weight)
    check_count("length", length)


def check_activation(activation: Activation) -> bool:
    """Whether there is one."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    return activation is not None


def check_filter(x: Tensor, weight: Tensor, bias: Tensor | None, channels: int) -> int:
    """weight and bias are those of x's channels; the filter's width."""
    check_tensor("weight", weight, (channels, "W"), x, any_float=True)
    if bias is not None:
        check_tensor("bias", bias, (channels,), x, any_float=True)
    return _check_width(weight)


def _check_width(weight: Tensor) -> int:
    if weight.shape[1] == 0:
        raise ValueError(f"weight must have at least one tap, got shape {tuple(weight.shape)}")
    return weight.shape[1]
