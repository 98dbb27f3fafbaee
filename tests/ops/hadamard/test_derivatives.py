"""The Hadamard transform among PyTorch's own: the dispatcher, derivatives, tracing, torch.func."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

import onchip
from onchip.ops import _native

F64 = torch.float64
LOW = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = [
    pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing)),
    pytest.mark.filterwarnings(
        "ignore:`torch.jit.script`:DeprecationWarning"
    ),  # PyTorch's forward mode warns of itself
]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, requires_grad=True)


SIGNS = {"none": lambda n: None, "integers": lambda n: torch.randint(2, (n,)) * 2 - 1, "learnt": randn}


@pytest.mark.parametrize("signs", SIGNS.values(), ids=SIGNS)
@pytest.mark.parametrize("shape", [(8,), (3, 4), (2, 3, 2), (0, 4), (5, 1)], ids=str)
def test_gradients(shape, signs):
    inputs = (randn(*shape), signs(shape[-1]))
    call = lambda x, signs: onchip.hadamard(x, signs, scale=0.7)  # noqa: E731
    assert gradcheck(call, inputs, check_forward_ad=True)
    assert gradgradcheck(call, inputs)


def test_gradients_with_factors_after():
    inputs = (randn(3, 4), randn(4), randn(4))
    op = lambda *tensors: torch.ops.onchip.hadamard(*tensors, 0.7)  # noqa: E731
    assert gradcheck(op, inputs, check_forward_ad=True)
    assert gradgradcheck(op, inputs)


def test_only_the_gradients_asked_for():
    x, signs = torch.randn(3, 8), torch.randn(8, requires_grad=True)
    onchip.hadamard(x, signs).sum().backward()
    assert x.grad is None and signs.grad is not None
    assert not onchip.hadamard(x, signs.detach()).requires_grad
    with torch.no_grad():
        assert not onchip.hadamard(x, signs).requires_grad


@pytest.mark.parametrize("dtype", [F64, *LOW], ids=str)
@pytest.mark.parametrize("signs", SIGNS.values(), ids=SIGNS)
def test_opcheck(signs, dtype):
    x = torch.randn(2, 3, 8).to(dtype)
    for leaf in (x.requires_grad_(), x.detach().transpose(0, 1)):
        torch.library.opcheck(torch.ops.onchip.hadamard.default, (leaf, signs(8), None, 0.5))


def test_fake_and_meta_tensors_get_the_real_shapes():
    x = torch.randn(2, 3, 8).transpose(0, 1).bfloat16()
    want = onchip.hadamard(x)
    with FakeTensorMode() as mode:
        fake = onchip.hadamard(mode.from_tensor(x))
    for other in (fake, onchip.hadamard(x.to("meta"))):
        assert (other.shape, other.stride(), other.dtype) == (want.shape, want.stride(), want.dtype)


@pytest.mark.parametrize("signs", SIGNS.values(), ids=SIGNS)
def test_compiled_is_the_same(signs):
    torch._dynamo.reset()
    compiled = torch.compile(onchip.hadamard, fullgraph=True, backend="aot_eager", dynamic=True)
    vector = signs(16)
    for rows in (5, 9):
        x = torch.randn(rows, 16, dtype=F64, requires_grad=True)
        results = [f(x, vector, scale=0.5) for f in (compiled, onchip.hadamard)]
        assert torch.equal(*results)
        assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in results))


def test_torch_func():
    x, signs = (t.detach() for t in (randn(5, 3, 8), randn(8)))
    per_row = randn(5, 8).detach()
    want = torch.stack([onchip.hadamard(*pair) for pair in zip(x, per_row, strict=True)])
    torch.testing.assert_close(vmap(onchip.hadamard)(x, per_row), want)
    assert torch.equal(vmap(onchip.hadamard, (1, None), 1)(x, signs), onchip.hadamard(x, signs))
    torch.testing.assert_close(vmap(onchip.hadamard, (None, 0))(x[0], per_row)[2], onchip.hadamard(x[0], per_row[2]))
    loss = lambda x, signs: onchip.hadamard(x, signs).pow(3).sum()  # noqa: E731
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(grad(loss)(x, signs), torch.autograd.grad(loss(leaf, signs), leaf)[0])
    rows = vmap(grad(loss), (0, None))(x, signs)
    torch.testing.assert_close(rows, grad(loss)(x, signs))
    tangent = torch.ones_like(x)
    torch.testing.assert_close(jvp(onchip.hadamard, (x,), (tangent,))[1], onchip.hadamard(tangent))


def test_autocast_leaves_it_alone():
    with torch.autocast("cpu", torch.bfloat16):
        assert onchip.hadamard(torch.randn(3, 8)).dtype == torch.float32
