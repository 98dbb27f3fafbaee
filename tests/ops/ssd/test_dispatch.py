"""ssd among PyTorch's own: the dispatcher, derivatives, tracing, memory."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

import onchip
from onchip.ops import _native

from .support import ALL_TERMS, DIFFERENTIABLE, F64, randn_case, run
from .test_step import step_arguments

pytestmark = [
    pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing)),
    pytest.mark.filterwarnings(
        "ignore:`torch.jit.script`:DeprecationWarning"
    ),  # PyTorch's forward mode warns of itself
]
INF = float("inf")


def op_arguments(call, softplus=False, low=-INF, high=INF):
    return (*(call[name] for name in (*DIFFERENTIABLE, "cu_seqlens")), softplus, low, high, None, None)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("more", [{}, ALL_TERMS], ids=["plain", "all"])
def test_gradients_through_initial_and_final_state(packed, more):
    call = randn_case(1, 7, 4, 3, 2, 2, chunk_size=3, cu_seqlens=[0, 2, 2, 7] if packed else None, **more)
    names = [name for name in DIFFERENTIABLE if isinstance(call[name], torch.Tensor)]
    rest = {name: value for name, value in call.arguments.items() if name not in names}
    function = lambda *x: tuple(  # noqa: E731
        onchip.ssd(**dict(zip(names, x, strict=True)), **rest, return_final_state=True, backend="cpu")
    )
    assert gradcheck(function, tuple(call[name].requires_grad_() for name in names))


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("more", [{}, ALL_TERMS | {"D": "wide"}], ids=["plain", "all"])
def test_opcheck(dtype, packed, more):
    call = randn_case(1, 9, 4, 3, 2, 5, cu_seqlens=[0, 2, 9] if packed else None, **more).to(dtype)
    for name in DIFFERENTIABLE:
        if isinstance(call[name], torch.Tensor):
            call[name].requires_grad_()
    torch.library.opcheck(torch.ops.onchip.ssd.default, op_arguments(call, bool(more), 0.1, 2.0))


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
def test_opcheck_of_the_step(dtype):
    call = randn_case(2, 1, 4, 3, 2, 5, **ALL_TERMS).to(dtype)
    step = step_arguments(call, 0) | {"state": call["initial_state"]}
    names = ("x_t", "state", "dt_t", "A", "B_t", "C_t", "D", "z", "dt_bias")
    args = (*(step[name] for name in names), True, 0.1, 2.0, None)
    torch.library.opcheck(torch.ops.onchip.ssd_step.default, args)
    torch.library.opcheck(torch.ops.onchip.ssd_step_into.default, (*args, torch.empty_like(call["initial_state"])))


def test_fake_and_meta_tensors_get_the_real_shapes():
    call = randn_case(2, 9, initial_state=True).to(torch.bfloat16)
    want = onchip.ssd(**call.arguments, return_final_state=True)
    with FakeTensorMode() as mode:
        arguments = {name: mode.from_tensor(x) for name, x in call.arguments.items()}
        fake = onchip.ssd(**arguments, return_final_state=True)
    meta = onchip.ssd(**{name: x.to("meta") for name, x in call.arguments.items()}, return_final_state=True)
    for got in (fake, meta):
        for x, y in zip(got, want, strict=True):
            assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_is_the_same(packed):
    torch._dynamo.reset()
    compiled = torch.compile(onchip.ssd, fullgraph=True, backend="aot_eager", dynamic=True)
    for time in (9, 14):
        call = randn_case(1, time, cu_seqlens=[0, 2, time] if packed else None, **ALL_TERMS)
        leaves = [call[name].requires_grad_() for name in DIFFERENTIABLE]
        results = [f(**call.arguments, return_final_state=True) for f in (compiled, onchip.ssd)]
        assert torch.equal(results[0].out, results[1].out)
        losses = [out.square().sum() + state.square().sum() for out, state in results]
        gradients = [torch.autograd.grad(loss, leaves) for loss in losses]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_compiled_step_updates_its_state():
    torch._dynamo.reset()
    call = randn_case(2, 1, **ALL_TERMS)
    state, arguments = call["initial_state"], step_arguments(call, 0)
    compiled = torch.compile(onchip.ssd_step, fullgraph=True, backend="aot_eager")
    want, new = onchip.ssd_step(state=state, **arguments)
    pure = compiled(state=state, **arguments)
    assert torch.equal(pure[0], want) and torch.equal(pure[1], new)
    y, same = compiled(state=state, **arguments, out_state=state)
    assert torch.equal(y, want) and torch.equal(state, new) and torch.equal(same, new)


def test_an_update_in_place_counts_as_one():
    call = randn_case(2, 1, initial_state=True)
    state, before = call["initial_state"], call["initial_state"]._version
    onchip.ssd_step(state=state, **step_arguments(call, 0), out_state=state)
    assert state._version == before + 1


def test_no_second_derivative_and_no_forward_mode_in_silence():
    call = randn_case(1, 5)
    x = call["x"].requires_grad_()
    out = onchip.ssd(**call.arguments, backend="cpu")
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: onchip.ssd(**call.but(x=x).arguments), (x.detach(),), (x.detach(),))


def test_torch_func_grad():
    call = randn_case(1, 5)
    loss = lambda x: onchip.ssd(**call.but(x=x).arguments).square().sum()  # noqa: E731
    leaf = call["x"].clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(call["x"]), torch.autograd.grad(loss(leaf), leaf)[0])


def test_only_one_result_differentiated():
    call = randn_case(2, 70, **ALL_TERMS)
    both = run(call, "cpu")
    halves = []
    for chosen in (0, 1):
        leaves = {name: call[name].detach().requires_grad_() for name in DIFFERENTIABLE}
        result = onchip.ssd(**(call.arguments | leaves), return_final_state=True)[chosen]
        weight = (call.grad_out, call.grad_state)[chosen]
        halves.append(torch.autograd.grad(result, tuple(leaves.values()), weight, materialize_grads=True))
    for name, a, b in zip(DIFFERENTIABLE, *halves, strict=True):
        torch.testing.assert_close(a + b, both[name], rtol=1e-10, atol=1e-10)


def test_explain_names_the_implementations():
    call = randn_case(1, 4)
    assert onchip.explain(onchip.ssd, *(call[name] for name in ("x", "dt", "A", "B", "C"))).chosen == "cpu"
