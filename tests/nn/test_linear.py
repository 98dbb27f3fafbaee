import torch
from torch import nn

from onchip.nn import Linear


def test_it_is_pytorchs_layer():
    layer, theirs = Linear(12, 5), nn.Linear(12, 5)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 12)
    torch.testing.assert_close(layer(x), theirs(x))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), theirs(x))
    layer(x).sum().backward()
    theirs(x).sum().backward()
    for ours, other in zip(layer.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad)
