"""Derivatives of the kernels: against finite differences, only those asked for, and never dropped in silence."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import onchip

from .support import DIFFERENTIABLE, randn_case, run
from .tolerance import assert_exact, assert_same

F64 = torch.float64


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64)


def gradients_of_everything(*shape, dtype=F64, **more):
    tq, tk, heads = shape[-3:]
    score = {"bias": randn(tq, tk), "alibi_slopes": randn(heads), "sinks": randn(heads)}
    return randn_case(*shape, **(score | more)).to(dtype)


CALLS = {
    "plain": lambda: randn_case(2, 4, 5, 2, dim=3),
    "grouped, causal, other value dim": lambda: randn_case(1, 5, 5, 4, kv_heads=2, dim=3, value_dim=2, causal=True),
    "window": lambda: randn_case(1, 5, 7, 2, kv_heads=1, window=(2, 1), scale=0.8),
    "softcap": lambda: randn_case(1, 4, 5, 2, softcap=0.9, causal=True),
    "bias for all": lambda: randn_case(2, 3, 4, 2, bias=randn(1)),
    "bias per key": lambda: randn_case(2, 3, 4, 2, bias=randn(2, 1, 1, 4), causal=True),
    "bias per head and query": lambda: randn_case(2, 3, 4, 4, kv_heads=2, bias=randn(4, 3, 1), softcap=2.0),
    "dense bias": lambda: randn_case(2, 3, 4, 2, bias=randn(2, 2, 3, 4)),
    "slopes": lambda: randn_case(2, 4, 3, 2, alibi_slopes=randn(2)),
    "slopes per sequence": lambda: randn_case(2, 4, 5, 2, alibi_slopes=randn(2, 2), window=(None, 2)),
    "sinks": lambda: randn_case(2, 4, 5, 2, sinks=randn(2), causal=True),
    "everything": lambda: gradients_of_everything(2, 3, 4, 4, kv_heads=2, softcap=3.0, causal=True),
    "dropout": lambda: gradients_of_everything(2, 4, 5, 4, kv_heads=2, dropout_p=0.4, seed=1, causal=True),
    "decoding with dropout": lambda: gradients_of_everything(2, 1, 9, 4, kv_heads=1, dim=8, dropout_p=0.4, seed=2),
    "decoding": lambda: gradients_of_everything(2, 1, 9, 4, kv_heads=1, dim=8, window=(6, 0)),
    "packed": lambda: gradients_of_everything(
        9,
        8,
        2,
        bias=randn(3, 1, 5, 4),
        cu_seqlens_q=torch.tensor([0, 2, 7, 9]),
        cu_seqlens_k=torch.tensor([0, 4, 8, 8]),
    ),
}


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
def test_gradcheck(backend, make):
    call = make()
    tensors = {name: call[name].requires_grad_() for name in DIFFERENTIABLE if call[name] is not None}

    def function(*values):
        arguments = call.arguments | dict(zip(tensors, values, strict=True))
        return onchip.attention_with_lse(**arguments, backend=backend)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_only_what_is_asked_for(backend, name):
    call = gradients_of_everything(2, 20, 30, 4, kv_heads=2)
    alone = {n: x.detach().requires_grad_(n == name) for n, x in call.arguments.items() if n in DIFFERENTIABLE}
    outputs = onchip.attention_with_lse(**(call.arguments | alone), backend=backend)
    torch.autograd.backward(outputs, (call.grad_out, call.grad_lse))
    assert torch.equal(alone[name].grad, run(call, backend)[name])
    assert [n for n in DIFFERENTIABLE if alone[n].grad is not None] == [name]


def test_through_either_output_alone(backend):
    call = gradients_of_everything(1, 20, 30, 2)
    tensors = {n: call[n].requires_grad_() for n in DIFFERENTIABLE}
    out, lse = onchip.attention_with_lse(**call.arguments, backend=backend)
    parts = [
        torch.autograd.grad(output, tuple(tensors.values()), weight, retain_graph=True, materialize_grads=True)
        for output, weight in ((out, call.grad_out), (lse, call.grad_lse))
    ]
    whole = run(call, backend)
    assert_exact({n: a + b for n, a, b in zip(tensors, *parts, strict=True)}, {n: whole[n] for n in tensors})


def test_gradients_of_one_element_for_all(backend):
    """What `out.sum().backward()` sends: a gradient without memory of its own."""
    call = randn_case(2, 20, 30, 2)
    q, k, v = (call[name].requires_grad_() for name in "qkv")
    out, lse = onchip.attention_with_lse(q, k, v, backend=backend)
    got = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v), retain_graph=True)
    want = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    assert all(map(torch.equal, got, want))


def test_expanded_keys_gather_the_gradient(backend):
    call = randn_case(1, 20, 30, 4, kv_heads=1)
    k = call["k"].requires_grad_()
    weight = call.grad_out
    shared = onchip.attention(call["q"], k, call["v"], backend=backend)
    copied = onchip.attention(call["q"], k.expand(1, 30, 4, 8), call["v"].expand(1, 30, 4, 8), backend=backend)
    torch.testing.assert_close(*(torch.autograd.grad(out, k, weight)[0] for out in (shared, copied)))


def test_gradients_have_their_inputs_dtype(backend):
    call = gradients_of_everything(1, 20, 30, 2, dtype=torch.bfloat16)
    call.arguments["bias"], call.arguments["sinks"] = call["bias"].double(), call["sinks"].float()
    results = run(call, backend)
    assert all(results[name].dtype == call[name].dtype for name in DIFFERENTIABLE)


def test_checkpointing_changes_no_bit(backend):
    call = gradients_of_everything(1, 20, 30, 2)
    tensors = tuple(call[name].requires_grad_() for name in "qkv")

    def function(q, k, v):
        return onchip.attention(q, k, v, causal=True, backend=backend)

    plain = torch.autograd.grad(function(*tensors), tensors, call.grad_out)
    again = torch.autograd.grad(checkpoint(function, *tensors, use_reentrant=False), tensors, call.grad_out)
    assert all(map(torch.equal, plain, again))


def test_an_input_changed_before_backward_is_noticed(backend):
    q, k, v = (randn(1, 5, 2, 8).requires_grad_() for _ in range(3))
    changed = k * 1
    out = onchip.attention(q, changed, v, backend=backend)
    changed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_second_derivative_is_refused(backend):
    call = gradients_of_everything(1, 5, 6, 2)
    q = call["q"].requires_grad_()
    (grad,) = torch.autograd.grad(onchip.attention(**call.arguments, backend=backend).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        grad.square().sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # in PyTorch's own decompositions
def test_a_forward_mode_derivative_is_refused(backend):
    q = randn(1, 5, 2, 8)
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*backend='reference'"):
        torch.func.jvp(lambda q: onchip.attention(q, q, q, backend=backend), (q,), (q,))
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(q, q)
        with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*backend='reference'"):
            onchip.attention(q, dual, q, backend=backend)


def test_functional_gradients_are_the_same(backend):
    call = randn_case(1, 20, 30, 2)

    def loss(q, k, v):
        out, lse = onchip.attention_with_lse(q, k, v, backend=backend)
        return (out * call.grad_out).sum() + (lse * call.grad_lse).sum()

    grads = torch.func.grad(loss, argnums=(0, 1, 2))(*(call[name] for name in "qkv"))
    assert_same(dict(zip("qkv", grads, strict=True)), {n: g for n, g in run(call, backend).items() if n in "qkv"})


def test_vmap_keeps_the_gradients(backend):
    q, k = randn(3, 1, 20, 2, 8).requires_grad_(), randn(1, 20, 2, 8)
    out = torch.func.vmap(lambda q: onchip.attention(q, k, k, backend=backend))(q)
    want = torch.stack([onchip.attention(x, k, k, backend=backend) for x in q])
    weight = torch.randn_like(out)
    assert torch.equal(out, want)
    assert torch.equal(*(torch.autograd.grad(x, q, weight)[0] for x in (out, want)))
