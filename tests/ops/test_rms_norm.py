"""The norm in one native call: as near as PyTorch's; all else is PyTorch's."""

import pytest
import torch
from torch.nn import functional as F

import onchip

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7,), (3, 7), (2, 5, 100), (2, 1, 3, 63), (900, 64)], ids=str)
def test_twice_eager(shape, dtype, served):
    x, weight = torch.randn(2, *shape[::-1]).to(dtype)[0].permute(*range(len(shape))[::-1]), torch.randn(shape[-1])
    weight = weight.to(dtype)
    exact = F.rms_norm(x.double(), weight.shape, weight.double(), EPS)
    y, eager = onchip.rms_norm(x, weight, EPS), F.rms_norm(x, weight.shape, weight, EPS)
    allowed = 2 * (eager.double() - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert y.dtype == dtype and y.is_contiguous()
    assert (y.double() - exact).abs().max() <= allowed
    assert served == [True]


def test_whoever_watches_sees_pytorchs(served):
    x, leaf = torch.randn(2, 8), torch.randn(8).requires_grad_()
    onchip.rms_norm(x, leaf, EPS).sum().backward()
    torch.testing.assert_close(leaf.grad, F.rms_norm(x, (8,), None, EPS).sum(0))
    weight = leaf.detach()
    compiled = torch.compile(onchip.rms_norm, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert onchip.rms_norm(x, weight, EPS).dtype == F.rms_norm(x, (8,), weight, EPS).dtype
    torch.testing.assert_close(compiled(x, weight, EPS), F.rms_norm(x, (8,), weight, EPS))
    assert served == []
    for odd in (x[:0], torch._neg_view(-x), x.to("meta")):
        want, y = (f(odd, weight.to(odd.device)) for f in (lambda x, w: F.rms_norm(x, (8,), w, EPS), by_us))
        assert (y.shape, y.dtype, y.device) == (want.shape, want.dtype, want.device)
        assert y.is_meta or torch.equal(y, want)
    assert not any(served)
    for eps in (None, 1):
        assert torch.equal(onchip.rms_norm(x, weight, eps), F.rms_norm(x, (8,), weight, eps))
    with pytest.raises(RuntimeError):
        onchip.rms_norm(x, torch.ones(7), EPS)


def by_us(x, weight):
    return onchip.rms_norm(x, weight, EPS)
