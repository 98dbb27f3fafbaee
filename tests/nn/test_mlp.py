import torch
from torch.nn import functional as F

from onchip.nn import MLP, GatedMLP


def test_against_the_formula():
    mlp = GatedMLP(6, 10).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    gate, up = mlp.gate_up.weight[:10], mlp.gate_up.weight[10:]
    torch.testing.assert_close(mlp(x), (F.silu(x @ gate.T) * (x @ up.T)) @ mlp.out.weight.T)


def test_the_plain_one_against_the_formula():
    mlp = MLP(6, 10, bias=True).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    h = x @ mlp.up.weight.T + mlp.up.bias
    h = h / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    torch.testing.assert_close(mlp(x), h @ mlp.out.weight.T + mlp.out.bias)
