"""causal-conv1d's functions: channels before time, and a state that may be a ring or a pool."""

from typing import Literal

import torch
from torch import Tensor

import onchip
from onchip.integrations._packing import packing
from onchip.ops import _select, _step
from onchip.ops._sequence import WithFinalState, check_tensor
from onchip.ops.causal_conv1d import IMPLEMENTATIONS, checks, step

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]

Activation = Literal["silu", "swish"] | None


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: Activation = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`onchip.causal_conv1d` in causal-conv1d's layout.

    Args:
        x: `(B, D, T)`, of any strides.
        weight: `(D, W)`, of any width.
        bias: `(D,)`.
        seq_idx: `(B, T)` int32 or int64, the number of the sequence that each token of a packed row is of. A change
            begins a sequence; where it is negative, for padding, the output is zero. It goes with no states.
        initial_states: `(B, D, W - 1)`, in x's dtype.
        return_final_states: return `(out, final_states)`, the latter `(B, D, W - 1)`.
        final_states_out: where the final states are written, if they are returned.
        activation: None, "silu" or "swish".

    Returns:
        `(B, D, T)`, contiguous along time or channels as x is. Differentiable in x, weight, bias and initial_states,
        also through the final states.

    Raises:
        ValueError: shapes or values that do not fit, naming the argument, what was expected and what came.
        TypeError: dtypes or devices that do not fit.

    >>> import torch
    >>> causal_conv1d_fn(torch.ones(1, 2, 5), torch.ones(2, 3), seq_idx=torch.tensor([[0, 0, 0, 1, 1]]))[0, 0]
    tensor([1., 2., 3., 1., 2.])
    """
    check_tensor("x", x, ("B", "D", "T"), x, any_float=False)
    if final_states_out is not None and not return_final_states:
        raise ValueError("final_states_out is only written with return_final_states=True")
    if seq_idx is not None:
        if initial_states is not None or return_final_states:
            given = "initial_states" if initial_states is not None else "return_final_states=True"
            raise ValueError(f"seq_idx goes with neither initial_states nor return_final_states, got {given}")
        return _packed(x, weight, bias, seq_idx, activation)
    shape = (*x.shape[:2], checks.check_filter(x, weight, bias, channels=x.shape[1]) - 1)
    for name, states in (("initial_states", initial_states), ("final_states_out", final_states_out)):
        if states is not None:
            check_tensor(name, states, shape, x, any_float=False)
    result = onchip.causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias,
        activation=activation,
        initial_state=None if initial_states is None else initial_states.transpose(1, 2),
        return_final_state=return_final_states,
    )
    if not isinstance(result, WithFinalState):
        return result.transpose(1, 2)
    final = result.final_state.transpose(1, 2)
    return result.out.transpose(1, 2), final if final_states_out is None else final_states_out.copy_(final)


def _packed(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, activation: Activation) -> Tensor:
    """Rows that hold several sequences: all rows become one, in which a sequence ends with its row."""
    batch, channels, length = x.shape
    cu_seqlens = packing(seq_idx, batch, length).cu_seqlens
    rows = x.transpose(1, 2).reshape(batch * length, channels)
    out = onchip.causal_conv1d(rows, weight, bias, activation=activation, cu_seqlens=cu_seqlens)
    out = out.reshape(batch, length, channels).masked_fill(seq_idx[..., None] < 0, 0.0)
    return out.transpose(1, 2)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Steps of decoding: the outputs of new inputs, which `conv_state` then holds; it is updated in place.

    Args:
        x: `(B, D)`, or `(B, D, T)`.
        conv_state: `(B, D, S)`, S ≥ W - 1, in x's dtype: the last S inputs, oldest first.
        weight, bias, activation: as in `causal_conv1d_fn`.
        cache_seqlens: `(B,)` int32 or int64; the state then is a ring, in which input t is at t mod S, and these are
            the numbers of inputs so far.
        conv_state_indices: `(B,)` int32 or int64; the state then is a pool `(any, D, S)`, in which these are the rows.
            They must differ; a negative one is padding: its output is zero, and no state is touched.

    Returns:
        `(B, D)` or `(B, D, T)`. Where a gradient is wanted, it passes through the state, too.

    Raises:
        ValueError: shapes or values that do not fit, naming the argument, what was expected and what came.
        TypeError: dtypes or devices that do not fit.

    >>> import torch
    >>> state = torch.tensor([[[1.0, 2.0]]])
    >>> causal_conv1d_update(torch.tensor([[3.0]]), state, torch.ones(1, 3)), state
    (tensor([[6.]]), tensor([[[2., 3.]]]))
    """
    one_token = isinstance(x, Tensor) and x.ndim == 2
    check_tensor("x", x, ("B", "D") if one_token else ("B", "D", "T"), x, any_float=False)
    if (x.ndim == 3 and x.shape[2] != 1) or cache_seqlens is not None or conv_state_indices is not None:
        inputs = x if x.ndim == 3 else x[..., None]
        out = _update(inputs, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
        return out if x.ndim == 3 else out[..., 0]
    x_t = x if x.ndim == 2 else x[..., 0]
    silu = _check_update(x_t, conv_state, weight, bias, activation, pool=False)
    in_reference = _select.choose("causal_conv1d_update", IMPLEMENTATIONS, None, x_t) == "reference"
    if in_reference or _step.differentiated(x_t, conv_state, weight, bias):
        out = _update(x_t[..., None], conv_state, weight, bias, activation, None, None)[..., 0]
    else:
        out = step.step(x_t, conv_state.transpose(1, 2), weight, bias, silu, None)
    return out if x.ndim == 2 else out[..., None]


def _update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    cache_seqlens: Tensor | None,
    indices: Tensor | None,
) -> Tensor:
    """Any update, of PyTorch's functions around the convolution."""
    _check_update(x, conv_state, weight, bias, activation, pool=indices is not None)
    for name, t in (("cache_seqlens", cache_seqlens), ("conv_state_indices", indices)):
        if t is not None:
            _check_integers(name, t, x)
    state = conv_state if indices is None else conv_state[indices.clamp(min=0)]
    history = weight.shape[1] - 1
    seen, new = _shifted(x, state, history) if cache_seqlens is None else _turned(x, state, history, cache_seqlens)
    inputs, before = x.transpose(1, 2), seen.transpose(1, 2)
    out = onchip.causal_conv1d(inputs, weight, bias, activation=activation, initial_state=before).transpose(1, 2)
    if indices is None:
        conv_state.copy_(new)
        return out
    used = indices >= 0
    conv_state[indices[used].long()] = new[used]
    return out.masked_fill(~used[:, None, None], 0.0)


def _shifted(x: Tensor, state: Tensor, history: int) -> tuple[Tensor, Tensor]:
    """What the filter sees of a state in order, and the state after x."""
    size = state.shape[2]
    # A copy: the state is then written to, and a backward pass may need what was there.
    return state[..., size - history :].clone(), torch.cat([state, x], 2)[..., x.shape[2] :]


def _turned(x: Tensor, state: Tensor, history: int, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a ring."""
    size, length = state.shape[2], x.shape[2]
    kept = min(size, length)  # what comes later overwrites

    def places(first: int, last: int) -> Tensor:
        where = (lengths.long()[:, None] + torch.arange(first, last, device=x.device)) % max(size, 1)
        return where[:, None].expand(-1, state.shape[1], -1)

    seen = state.gather(2, places(-history, 0))
    return seen, state.scatter(2, places(length - kept, length), x[..., length - kept :])


def _check_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, *, pool: bool
) -> bool:
    """The arguments fit each other; whether there is an activation."""
    history = checks.check_filter(x, weight, bias, channels=x.shape[1]) - 1
    shape = ("rows" if pool else x.shape[0], x.shape[1], "S")
    check_tensor("conv_state", conv_state, shape, x, any_float=False)
    if conv_state.shape[2] < history:
        raise ValueError(f"conv_state must hold at least W - 1 = {history} inputs, got shape {tuple(conv_state.shape)}")
    return checks.check_activation(activation)


def _check_integers(name: str, t: Tensor, x: Tensor) -> None:
    if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"{name} must have shape ({x.shape[0]},), got {tuple(t.shape)}")
