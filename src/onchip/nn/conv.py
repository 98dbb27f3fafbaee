"""The short causal convolution with its parameters."""

import math
from typing import overload

import torch
from torch import Tensor, nn

from onchip.ops import causal_conv1d, causal_conv1d_step
from onchip.ops._count import check_sizes
from onchip.ops.causal_conv1d.checks import Activation


class CausalConv1d(nn.Module):
    """Each of `d` features convolved along time with a filter of `width` taps of its own; see `onchip.causal_conv1d`.

    ```
    y = conv(x)                          x (B, T, d)
    y = conv(x, cu_seqlens=cu)           packed: x (total, d)
    y, state = conv(x, state)            chunked; state (B, width - 1, d), the last inputs
    y_t, state = conv.step(x_t, state)   x_t (B, d)
    ```

    The taps and the bias begin uniform in ±1/√width, as PyTorch's convolutions do.

    >>> conv = CausalConv1d(8, width=4, activation="silu")
    >>> x = torch.randn(2, 6, 8)
    >>> y, state = conv(x[:, :5], torch.zeros(2, 3, 8))
    >>> torch.allclose(conv.step(x[:, 5], state)[0], conv(x)[:, 5], atol=1e-6)
    True
    """

    def __init__(self, d: int, width: int, *, bias: bool = True, activation: Activation = None) -> None:
        super().__init__()
        check_sizes(d=d, width=width)
        self.activation = activation
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(d, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(d).uniform_(-bound, bound)) if bias else None

    @overload
    def forward(self, x: Tensor, state: None = None, *, cu_seqlens: Tensor | None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The parallel form, packed with `cu_seqlens`; with `state` the chunked one and the state after it."""
        return causal_conv1d(
            x,
            self.weight,
            self.bias,
            activation=self.activation,
            initial_state=None if state is None else state.to(x.dtype),
            return_final_state=state is not None,
            cu_seqlens=cu_seqlens,
        )

    def step(self, x_t: Tensor, state: Tensor, *, overwrite: bool = False) -> tuple[Tensor, Tensor]:
        """One token further; with `overwrite` the new state may be in the place of the old."""
        state = state.to(x_t.dtype)
        out_state = state if overwrite else None
        return causal_conv1d_step(x_t, state, self.weight, self.bias, activation=self.activation, out_state=out_state)

    def extra_repr(self) -> str:
        """What `print` shows of it."""
        d, width = self.weight.shape
        return f"{d}, width={width}, bias={self.bias is not None}, activation={self.activation!r}"
