"""The linear layer of onchip's modules."""

from torch import Tensor, nn

from onchip.ops import linear


class Linear(nn.Linear):
    """PyTorch's linear layer; it reads its weights at the rate of memory where a model decodes on a CPU.

    See `onchip.linear`.

    >>> import torch
    >>> layer = Linear(16, 40)
    >>> with torch.no_grad():
    ...     layer(torch.randn(1, 16)).shape
    torch.Size([1, 40])
    """

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        return linear(x, self.weight, self.bias)
