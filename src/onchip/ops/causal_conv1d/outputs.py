"""What every implementation of the causal convolution writes its results into, and the state after the last input."""

import torch
from torch import Tensor


def time_contiguous(x: Tensor) -> bool:
    """Whether neighbours in memory are neighbours in time, and not channels."""
    return x.stride(-2) == 1 and (x.stride(-1) != 1 or x.shape[-1] == 1)


def output_like(x: Tensor) -> Tensor:
    """Uninitialised, of x's shape, contiguous along time where x is, else along channels."""
    if time_contiguous(x):
        return x.new_empty((*x.shape[:-2], x.shape[-1], x.shape[-2])).transpose(-1, -2)
    return x.new_empty(x.shape)


def in_layout_of(x: Tensor, grad: Tensor) -> Tensor:
    """`grad`, copied where it is not contiguous along the dimension that an output like x is."""
    return grad if grad.stride(-2 if time_contiguous(x) else -1) == 1 else output_like(x).copy_(grad)


def state_like(x: Tensor, width: int, cu_seqlens: Tensor | None) -> Tensor:
    """An uninitialised state."""
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty((sequences, width - 1, x.shape[-1]))


def final_state(x: Tensor, initial_state: Tensor | None, width: int, cu_seqlens: Tensor | None) -> Tensor:
    """The last inputs of each sequence, those of its initial state among them where it is short."""
    state = state_like(x, width, cu_seqlens).zero_() if initial_state is None else initial_state
    if cu_seqlens is None:
        length = x.shape[1]
        return torch.cat([state[:, length:], x[:, max(length - width + 1, 0) :]], 1)
    if x.shape[0] == 0:
        return state.clone()
    inside, rows, before = _sources(width, cu_seqlens)
    sequence = torch.arange(len(state), device=x.device)[:, None]
    return torch.where(inside[..., None], x[rows], state[sequence, before])


def add_through_final_state(grad: Tensor, grad_x: Tensor, grad_state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Adds the gradient of the final state to that of the inputs that it holds."""
    history = grad.shape[1]
    if cu_seqlens is None:
        length = grad_x.shape[1]
        there = min(length, history)
        grad_x[:, length - there :] += grad[:, history - there :]
        if grad_state is not None and length < history:
            grad_state[:, length:] += grad[:, : history - length]
        return
    if history == 0:
        return
    inside, rows, _ = _sources(history + 1, cu_seqlens)
    if grad_x.shape[0] > 0:
        grad_x.index_add_(0, rows.flatten(), torch.where(inside[..., None], grad, 0.0).flatten(0, 1))
    if grad_state is not None:
        sequence = torch.arange(len(grad), device=grad.device)[:, None]
        row = torch.arange(history, device=grad.device) - cu_seqlens.diff()[:, None]  # of the final state
        grad_state += torch.where((row >= 0)[..., None], grad[sequence, row.clamp(min=0)], 0.0)


def _sources(width: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of each final state: whether it is an input, which one it is, and which row of the initial state."""
    history, starts = width - 1, cu_seqlens[:-1, None]
    source = cu_seqlens.diff()[:, None] + torch.arange(history, device=cu_seqlens.device)
    return source >= history, (starts + source - history).clamp(min=0), source.clamp(max=max(history - 1, 0))
