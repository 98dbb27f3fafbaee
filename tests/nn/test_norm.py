import pytest
import torch
from torch.nn import functional as F

from onchip.nn import RMSNormGated


def by_hand(x, z, norm, d):
    gate = 1 if z is None else z * torch.sigmoid(z)
    y = x if norm.norm_before_gate else x * gate
    groups = y.unflatten(-1, (norm.n_groups, d // norm.n_groups))
    y = (groups / (groups.square().mean(-1, keepdim=True) + norm.eps).sqrt()).flatten(-2) * norm.weight
    return y * gate if norm.norm_before_gate else y


@pytest.mark.parametrize("n_groups", [1, 3])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_formula_and_gradients(n_groups, norm_before_gate, gated):
    norm = RMSNormGated(12, n_groups=n_groups, norm_before_gate=norm_before_gate, eps=0.1).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True) if gated else None
    torch.testing.assert_close(norm(x, z), by_hand(x, z, norm, 12), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(norm, (x, z) if gated else (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_rounds_once(dtype):
    norm = RMSNormGated(64).to(dtype)
    x, z = torch.randn(2, 100, 64).to(dtype).unbind(0)
    y = norm(x, z)
    exact = by_hand(x.double(), z.double(), norm, 64)
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-7).all()
    torch.testing.assert_close(norm(x), F.rms_norm(x.float(), (64,), eps=norm.eps).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("n_groups", [0, 5])
def test_groups_must_divide(n_groups):
    with pytest.raises(ValueError, match=f"n_groups must divide d = 12, got {n_groups}"):
        RMSNormGated(12, n_groups=n_groups)
