"""A linear map of few rows: as near as PyTorch's, one row by itself as among others; all else is PyTorch's."""

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import onchip
from onchip.ops.linear import MAX_ROWS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (2, 7, 33), (3, 100, 31), (5, 8, 128), (MAX_ROWS, 65, 200)]  # rows, out, in


class Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_twice_eager(shape, dtype, served):
    rows, out, into = shape
    x, weight, bias = normal(rows, into, dtype=dtype), normal(out, into, dtype=dtype), normal(out, dtype=dtype)
    for offset in (None, bias):
        exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
        y, eager = onchip.linear(x, weight, offset), F.linear(x, weight, offset)
        terms = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
        slack = torch.finfo(dtype).eps * exact.abs() + 4 * torch.finfo(torch.float32).eps * terms
        assert y.dtype == dtype and y.is_contiguous()
        assert ((y.double() - exact).abs() <= 2 * (eager.double() - exact).abs().max() + slack).all()
    assert served == [True, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_among_others_and_on_any_number_of_threads(dtype, served):
    x, weight = normal(MAX_ROWS, 300, dtype=dtype), normal(2500, 300, dtype=dtype)
    each = torch.cat([onchip.linear(row, weight) for row in x.split(1)])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for rows in range(2, MAX_ROWS + 1):
                assert torch.equal(onchip.linear(x[:rows], weight), each[:rows])
    finally:
        torch.set_num_threads(threads)
    assert all(served)


def test_any_strides_and_dimensions(served):
    x, weight = normal(3, 2, 64), normal(10, 80)[:, 7:71]
    want = F.linear(x, weight)
    for view in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x.repeat_interleave(2, -1)[..., ::2], x[:, :1]):
        torch.testing.assert_close(onchip.linear(view, weight), want[:, : view.shape[1]])
    torch.testing.assert_close(onchip.linear(x[:, 1], weight), want[:, 1])
    torch.testing.assert_close(onchip.linear(x[2, 1], weight), want[2, 1])
    torch.testing.assert_close(onchip.linear(x.transpose(0, 1)[:, None], weight), want.transpose(0, 1)[:, None])
    assert served == [True] * 7


def test_infinities_and_nans_stay_in_their_row(served):
    x = torch.ones(3, 40)
    x[0, 39], x[2, 0] = torch.inf, torch.nan
    y = onchip.linear(x, torch.ones(9, 40))
    assert (y[0] == torch.inf).all() and (y[1] == 40).all() and y[2].isnan().all()
    assert served == [True]


def test_what_does_not_fit_is_pytorchs(served):
    x, weight = normal(2, 16), normal(5, 16)
    for odd in (
        (normal(MAX_ROWS + 1, 16), weight),
        (x.double(), weight.double()),
        (x[:0], weight),
        (x[None, None, None], weight),
        (x, normal(16, 5).T),
        (x, torch._neg_view(-weight)),
        (x.to("meta"), weight.to("meta")),
    ):
        want, y = F.linear(*odd), onchip.linear(*odd)
        assert (y.shape, y.dtype, y.device) == (want.shape, want.dtype, want.device)
        assert y.is_meta or torch.equal(y, want)
    assert not any(served)
    for wrong in ((x, weight.double()), (x, normal(5, 15)), (x, weight, normal(4))):
        with pytest.raises(RuntimeError):
            onchip.linear(*wrong)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_whoever_watches_sees_pytorchs(served):
    x, weight = normal(2, 16), normal(5, 16)
    leaf = weight.clone().requires_grad_()
    onchip.linear(x, leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, x.sum(0).expand(5, 16))
    with torch.autocast("cpu", torch.bfloat16):
        assert onchip.linear(x, weight).dtype == torch.bfloat16
    traced = torch.jit.trace(lambda x: onchip.linear(x, weight), x, check_trace=False)
    compiled = torch.compile(onchip.linear, fullgraph=True, backend="aot_eager")
    batched = torch.func.vmap(onchip.linear, (0, None))(x[:, None], weight)[:, 0]
    with Seen() as functions:
        onchip.linear(x, weight)
    assert F.linear in functions.seen
    assert served == []
    for y in (traced(2 * x) / 2, compiled(x, weight), batched):
        torch.testing.assert_close(y, F.linear(x, weight))
