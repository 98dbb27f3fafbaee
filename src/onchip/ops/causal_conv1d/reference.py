"""The definition of the causal convolution, in plain PyTorch: any dtype, any device, differentiable.

Everything else that calls itself a causal convolution is compared with this file.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu as _silu

from onchip.ops._sequence import STATE_DTYPES, sequences


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """`onchip.causal_conv1d` with its final state; arguments already checked."""
    if cu_seqlens is None:
        return _rows(x, weight, bias, initial_state, silu)
    outs, finals = [x[None, :0]], [x.new_zeros(0, weight.shape[1] - 1, x.shape[1])]
    for i, rows in enumerate(sequences(cu_seqlens, x.shape[0])):
        out, final = _rows(x[None, rows], weight, bias, None if initial_state is None else initial_state[i, None], silu)
        outs.append(out)
        finals.append(final)
    return torch.cat(outs, 1)[0], torch.cat(finals)


def _rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """(B, T, D) and its final state: sums are in float32, in float64 for float64 inputs."""
    batch, length, channels = x.shape
    before = x.new_zeros(batch, weight.shape[1] - 1, channels) if initial_state is None else initial_state
    inputs = torch.cat([before, x], 1)
    wide, taps = (t.to(STATE_DTYPES[x.dtype]) for t in (inputs, weight))
    y = sum((tap * wide[:, w : w + length] for w, tap in enumerate(taps.unbind(1))), torch.zeros_like(wide[:, :length]))
    if bias is not None:
        y = y + bias.to(wide.dtype)
    return (_silu(y) if silu else y).to(x.dtype), inputs[:, length:]


def step(x_t: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """`onchip.causal_conv1d_step`; arguments already checked."""
    out, new = _rows(x_t[:, None], weight, bias, state, silu)
    return out[:, 0], new


def matrix(weight: Tensor, length: int) -> Tensor:
    """`onchip.causal_conv1d_matrix`; arguments already checked."""
    time = torch.arange(length, device=weight.device)
    back, width = time[:, None] - time, weight.shape[1]
    taps = weight[:, (width - 1 - back).clamp(0, width - 1)]
    return taps.masked_fill((back < 0) | (back >= width), 0.0)
