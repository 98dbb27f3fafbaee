import torch
from torch.nn import functional as F

from onchip.nn import GatedMLP


def test_against_the_formula():
    mlp = GatedMLP(6, 10).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    gate, up = mlp.gate_up.weight[:10], mlp.gate_up.weight[10:]
    torch.testing.assert_close(mlp(x), (F.silu(x @ gate.T) * (x @ up.T)) @ mlp.out.weight.T)
