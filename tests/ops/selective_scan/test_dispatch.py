"""The selective scan among PyTorch's own: the dispatcher, derivatives, tracing; and which implementation serves."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck

import onchip
from onchip.ops import _native, _select

from .support import F64, FEATURES, PER_TOKEN, TENSORS, assert_exact, case, forward, run

pytestmark = [
    pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing)),
    pytest.mark.filterwarnings(
        "ignore:`torch.jit.script`:DeprecationWarning"  # PyTorch's forward mode warns of itself
    ),
]
ORDER = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "cu_seqlens", "dt_softplus")
CALLS = {
    "everything": {},
    "plain": FEATURES["plain"],
    "packed": {"lengths": [3, 0, 40]},
}


@pytest.mark.parametrize("more", CALLS.values(), ids=CALLS)
def test_gradcheck(more):
    small = {"lengths": [2, 0, 3]} if "lengths" in more else {"batch": 1, "time": 4, **more}
    call = case(channels=4, states=2, **small)
    names = [n for n in TENSORS if call[n] is not None]

    def scan(*tensors):
        arguments = call.arguments | dict(zip(names, tensors, strict=True))
        return tuple(onchip.selective_scan(**arguments, return_final_state=True))

    assert gradcheck(scan, [call[n].requires_grad_() for n in names])


@pytest.mark.parametrize("more", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(more, dtype):
    call = case(time=40, **more).to(dtype)
    for grad in (False, True):
        if grad:
            call["x"].requires_grad_()
            call["A"].requires_grad_()
        torch.library.opcheck(torch.ops.onchip.selective_scan.default, (*(call[n] for n in ORDER), False, None))


def test_opcheck_of_a_step():
    call = case(time=1).to(torch.float32)
    x, dt, B, C, z = (call[n][:, 0].contiguous() for n in PER_TOKEN)
    arguments = (x, call["initial_state"], dt, call["A"], B, C, call["D"], z, call["dt_bias"], True, None)
    torch.library.opcheck(torch.ops.onchip.selective_scan_step.default, arguments)


@pytest.mark.parametrize("more", CALLS.values(), ids=CALLS)
def test_compiled_is_the_same(more):
    torch._dynamo.reset()
    compiled = torch.compile(onchip.selective_scan, fullgraph=True, backend="aot_eager", dynamic=True)
    for seed in (0, 1):
        call = case(time=40 + seed, seed=seed, **more)
        got = run(call, scan=compiled)
        assert_exact(got, run(call))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_step_is_the_same(in_place):
    torch._dynamo.reset()
    call = case(time=1).to(torch.float32)
    x, dt, B, C, z = (call[n][:, 0] for n in PER_TOKEN)

    def step(state):
        out_state = state if in_place else None
        return onchip.selective_scan_step(x, state, dt, call["A"], B, C, D=call["D"], z=z, out_state=out_state)

    states = [call["initial_state"].clone() for _ in range(2)]
    results = [
        f(h) for f, h in zip((step, torch.compile(step, fullgraph=True, backend="aot_eager")), states, strict=True)
    ]
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert torch.equal(*states) and torch.equal(states[0], call["initial_state"]) != in_place


@pytest.mark.parametrize("more", CALLS.values(), ids=CALLS)
def test_fake_and_meta_tensors_get_the_real_shapes(more):
    call, mode = case(**more).to(torch.bfloat16), FakeTensorMode()

    def moved(move):
        return {n: move(u) if isinstance(u, torch.Tensor) else u for n, u in call.arguments.items()}

    real = forward(call).values()
    with mode:
        fake = onchip.selective_scan(**moved(mode.from_tensor), return_final_state=True)
    others = [fake]
    if "lengths" not in more:
        others.append(onchip.selective_scan(**moved(lambda u: u.to("meta")), return_final_state=True))
    for other in others:
        for u, v in zip(real, other, strict=True):
            assert (u.shape, u.stride(), u.dtype) == (v.shape, v.stride(), v.dtype)


def test_only_the_gradients_asked_for():
    call = case()
    call["dt_bias"].requires_grad_()
    onchip.selective_scan(**call.arguments).sum().backward()
    assert call["dt_bias"].grad is not None and call["x"].grad is None
    with torch.no_grad():
        assert not onchip.selective_scan(**call.arguments).requires_grad


@pytest.mark.parametrize("output", [0, 1])
def test_a_gradient_through_one_result_only(output):
    call = case(time=40)
    grads = []
    for backend in ("cpu", "reference"):
        x = call["x"].clone().requires_grad_()
        results = onchip.selective_scan(**(call.arguments | {"x": x}), return_final_state=True, backend=backend)
        grads.append(torch.autograd.grad(results[output].square().sum(), x)[0])
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def test_a_step_has_gradients():
    call = case(time=1)
    x, dt, B, C, z = (call[n][:, 0] for n in PER_TOKEN)

    def step(x, state, dt, A, B, C, z):
        return onchip.selective_scan_step(x, state, dt, A, B, C, z=z, dt_softplus=True)

    inputs = [u.clone().requires_grad_() for u in (x, call["initial_state"], dt, call["A"], B, C, z)]
    assert gradcheck(step, inputs)


def test_torch_func_differentiates():
    call = case(time=12)
    rest = {n: u for n, u in call.arguments.items() if n != "x"}

    def loss(x, backend):
        return onchip.selective_scan(x, **rest, backend=backend).square().sum()

    got, want = (torch.func.grad(loss)(call["x"], backend) for backend in ("cpu", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_what_has_no_derivative_says_so():
    call = case(time=5)
    call["x"].requires_grad_()
    (grad,) = torch.autograd.grad(onchip.selective_scan(**call.arguments).sum(), call["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan: the fused kernels have no second derivative"):
        grad.sum().backward()
    with forward_ad.dual_level():
        x = forward_ad.make_dual(call["x"].detach(), torch.ones_like(call["x"]))
        with pytest.raises(RuntimeError, match="selective_scan: the fused kernels have no forward-mode derivative"):
            onchip.selective_scan(**(call.arguments | {"x": x}))


def test_a_lazily_negated_view_is_read_with_its_sign():
    call = case(batch=1, time=4, channels=4)
    x = torch.view_as_complex(torch.randn(1, 4, 4, 2, dtype=F64)).conj().imag
    assert x.is_neg()
    want = forward(call.replace(x=x.resolve_neg()))
    assert torch.equal(forward(call.replace(x=x))["out"], want["out"])


def test_who_serves_is_said(monkeypatch):
    call = case().to(torch.float32)
    explained = onchip.explain(onchip.selective_scan, **call.arguments)
    assert [c.name for c in explained.candidates] == ["cpu", "triton", "reference"] and explained.chosen == "cpu"
    with pytest.raises(ValueError, match="backend='triton' cannot serve this call: it computes in float32"):
        onchip.selective_scan(**case().arguments, backend="triton")
    many = case(channels=1, groups=1, states=257).to(torch.float32)
    with pytest.raises(ValueError, match=r"backend='triton' cannot serve this call: it holds .* up to 256, .* has 257"):
        onchip.selective_scan(**many.arguments, backend="triton")
    monkeypatch.setattr(_native, "missing", "the native kernels are on holiday")
    monkeypatch.setattr(_select, "_WARNED", set())
    with pytest.warns(
        UserWarning, match="selective_scan runs on its slow reference: the native kernels are on holiday"
    ):
        onchip.selective_scan(**call.arguments)
