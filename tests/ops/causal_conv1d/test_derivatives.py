"""The causal convolution's gradients, and its place among PyTorch's own: the dispatcher, tracing, torch.func."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp
from torch.nn.functional import silu

import onchip
from onchip.ops import _native

from .conftest import ON_GPU, Target
from .test_values import LAYOUTS, eager, inputs

F64 = torch.float64
CU = torch.tensor([0, 4, 4, 5, 11])

native = pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    "size", [(2, 6, 3, 4), (1, 2, 2, 4), (2, 1, 2, 3), (1, 5, 3, 1), (1, 3, 2, 7), (1, 0, 2, 3)], ids=str
)
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=native)])
def test_gradcheck(backend, size, activation):
    tensors = [t.requires_grad_() for t in inputs(*size)]

    def call(x, weight, bias, state):
        return onchip.causal_conv1d(
            x, weight, bias, initial_state=state, activation=activation, return_final_state=True, backend=backend
        )

    assert gradcheck(call, tensors)


@native
@pytest.mark.parametrize("layout", ["contiguous", "time contiguous"])
def test_gradcheck_of_packed_sequences(layout):
    x, weight, bias, _ = inputs(1, 11, 2, 4)
    state = torch.randn(4, 3, 2, dtype=F64)
    x = LAYOUTS[layout](x)[0]

    def call(x, weight, bias, state):
        options = {"initial_state": state, "activation": "silu", "return_final_state": True}
        return onchip.causal_conv1d(x, weight, bias, cu_seqlens=CU, **options)

    assert gradcheck(call, [t.requires_grad_() for t in (x, weight, bias, state)])


def gradients(function, tensors: list[Tensor | None], weights: list[Tensor]) -> list[Tensor]:
    """Of a weighted sum of the results."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    results = function(*leaves)
    results = [results] if isinstance(results, Tensor) else results
    loss = sum((r * w.to(r.dtype)).sum() for r, w in zip(results, weights, strict=True))
    return torch.autograd.grad(loss, [t for t in leaves if t is not None])


def plain(x, weight, bias, state):
    """With SiLU and its final state, in x's dtype, as one writes it in PyTorch."""
    return eager(x, weight, bias, state, True), torch.cat([state, x], 1)[:, x.shape[1] :]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(2, 300, 19, 4), (3, 2, 37, 3), (1, 65, 8, 5)], ids=str)
def test_gradients(target: Target, size, layout):
    """At most twice eager PyTorch's error, plus a rounding and a few of the arithmetic's of the terms summed."""
    if target.backend == "triton" and not ON_GPU:
        if layout not in ("contiguous", "time contiguous") or size[1] == 65:
            pytest.skip("interpreted, each takes seconds")
        size = (size[0], min(size[1], 40), *size[2:])
    for dtype in target.dtypes:
        tensors = list(inputs(*size, dtype))
        tensors[0] = LAYOUTS[layout](tensors[0])
        weights = [LAYOUTS[layout](torch.randn(tensors[0].shape).to(dtype)), torch.randn(tensors[3].shape).to(dtype)]

        def call(x, weight, bias, state):
            options = {"initial_state": state, "activation": "silu", "return_final_state": True}
            return target.conv(x, weight, bias, **options)

        got, eagers = gradients(call, tensors, weights), gradients(plain, tensors, weights)
        exact = gradients(plain, [t.to(F64) for t in tensors], weights)
        terms = gradients(magnitudes, [t.to(F64).abs() for t in tensors], [w.to(F64).abs() for w in weights])
        for name, g, e, want, size_of_terms in zip("xwbs", got, eagers, exact, terms, strict=True):
            assert g.dtype == dtype
            if dtype == F64:
                torch.testing.assert_close(g, want, rtol=1e-10, atol=1e-10)
            elif want.numel():
                allowed = 2 * (e.to(F64) - want).abs().max() + torch.finfo(dtype).eps * want.abs()
                allowed = allowed + 8 * torch.finfo(torch.float32).eps * size_of_terms
                excess = ((g.to(F64) - want).abs() - allowed).max()
                assert excess <= 0, f"{name} in {dtype}: {excess:.3e} too much"


def magnitudes(x, weight, bias, state):
    """The slope of SiLU is at most 1.1: what a gradient sums is at most that of the convolution of magnitudes."""
    return 1.1 * eager(x, weight, bias, state, False), torch.cat([state, x], 1)[:, x.shape[1] :]


def test_packed_gradients_are_those_one_by_one(target: Target):
    dtype = target.dtypes[0]
    x, weight, bias, _ = inputs(1, 11, 5, 4, dtype)
    state, w_out, w_state = torch.randn(4, 3, 5, dtype=dtype), torch.randn(11, 5), torch.randn(4, 3, 5)
    options = {"activation": "silu", "return_final_state": True}

    def packed(x, weight, bias, state):
        return target.conv(x, weight, bias, initial_state=state, cu_seqlens=CU, **options)

    def one_by_one(x, weight, bias, state):
        parts = [
            onchip.causal_conv1d(
                x[None, a:b], weight, bias, initial_state=state[i, None], backend="reference", **options
            )
            for i, (a, b) in enumerate(pairwise(CU.tolist()))
        ]
        return torch.cat([p.out[0] for p in parts]), torch.cat([p.final_state for p in parts])

    arguments = [x[0], weight, bias, state], [w_out, w_state]
    for got, want in zip(gradients(packed, *arguments), gradients(one_by_one, *arguments), strict=True):
        torch.testing.assert_close(got, want)


def test_gradient_of_the_state_alone(target: Target):
    x, weight, _, state = (t.requires_grad_() for t in inputs(2, 2, 3, 4, torch.float32))
    _, final = target.conv(x, weight, initial_state=state, return_final_state=True)
    grads = torch.autograd.grad(final.sum(), (x, state, weight), allow_unused=True)
    assert torch.equal(grads[0], torch.ones_like(x))
    assert torch.equal(grads[1], torch.tensor([0.0, 0.0, 1.0])[:, None].expand(2, 3, 3))
    assert grads[2] is None or not grads[2].any()


def test_only_the_gradients_asked_for(target: Target):
    x, weight, bias, _ = inputs(2, 5, 3, 4, torch.float32)
    target.conv(x, weight.requires_grad_(), bias).sum().backward()
    assert x.grad is None and weight.grad is not None and bias.grad is None
    with torch.no_grad():
        assert not target.conv(x, weight, bias).requires_grad


@native
def test_threads_change_no_bits():
    for layout in ("contiguous", "time contiguous"):
        tensors = [t.requires_grad_() for t in inputs(2, 1100, 70, 4, torch.float32)]
        x = LAYOUTS[layout](tensors[0])
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            try:
                y = onchip.causal_conv1d(x, *tensors[1:3], initial_state=tensors[3], activation="silu", backend="cpu")
                results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
            finally:
                torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@native
def test_no_second_derivative_in_silence():
    x, weight, _, _ = inputs(1, 5, 2, 3)
    x.requires_grad_()
    call = lambda x, backend: onchip.causal_conv1d(x, weight, activation="silu", backend=backend)  # noqa: E731
    (first,) = torch.autograd.grad(call(x, "cpu").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative; onchip\.causal_conv1d.*backend='reference'"):
        first.sum().backward()
    assert gradgradcheck(lambda x: call(x, "reference"), x)


@native
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # PyTorch's forward mode warns of itself
def test_torch_func():
    x, weight, bias, state = inputs(2, 5, 3, 4)
    loss = lambda x, backend: onchip.causal_conv1d(x, weight, bias, backend=backend).pow(3).sum()  # noqa: E731
    torch.testing.assert_close(grad(loss)(x, "cpu"), grad(loss)(x, "reference"))
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative; onchip\.causal_conv1d.*backend='reference'"):
        jvp(lambda x: loss(x, "cpu"), (x,), (x,))
    y = lambda x_t: onchip.causal_conv1d_step(x_t, state, weight)[0].sum()  # noqa: E731
    torch.testing.assert_close(grad(y)(x[:, 0]), weight[:, -1].expand(2, 3))


OPTIONAL = {
    "all": lambda x, bias, state: (bias, state, None),
    "none": lambda x, bias, state: (None, None, None),
    "packed": lambda x, bias, state: (bias, state.new_ones(2, *state.shape[1:]), torch.tensor([0, 2, 6])),
}


@native
@pytest.mark.parametrize("wants_state", [False, True])
@pytest.mark.parametrize("optional", OPTIONAL)
@pytest.mark.parametrize("layout", ["contiguous", "time contiguous"])
def test_opcheck(layout, optional, wants_state):
    x, weight, bias, state = inputs(1, 6, 3, 4, torch.float32)
    x = LAYOUTS[layout](x)
    x = x[0] if optional == "packed" else x
    bias, state, cu_seqlens = OPTIONAL[optional](x, bias, state)
    leaves = [t if t is None else t.requires_grad_() for t in (x.detach(), weight, bias, state)]
    torch.library.opcheck(torch.ops.onchip.causal_conv1d.default, (*leaves, cu_seqlens, True, wants_state, None))


@native
def test_opcheck_of_the_backward_pass_and_the_step():
    x, weight, bias, state = inputs(2, 6, 3, 4, torch.float32)
    ops = torch.ops.onchip
    arguments = (x, weight, bias, state, None, True, None)
    torch.library.opcheck(ops.causal_conv1d_backward.default, (x, state, *arguments))
    torch.library.opcheck(ops.causal_conv1d_backward.default, (x, None, x, weight, None, None, None, False, None))
    torch.library.opcheck(ops.causal_conv1d_step.default, (x[:, 0], state, weight, bias, True, None))


@native
def test_fake_and_meta_tensors_get_the_real_shapes():
    for layout in ("contiguous", "time contiguous"):
        x, weight, _, _ = inputs(2, 5, 3, 4, torch.bfloat16)
        x = LAYOUTS[layout](x)
        want = onchip.causal_conv1d(x, weight, return_final_state=True)
        with FakeTensorMode() as mode:
            fake = onchip.causal_conv1d(mode.from_tensor(x), mode.from_tensor(weight), return_final_state=True)
        meta = onchip.causal_conv1d(x.to("meta"), weight.to("meta"), return_final_state=True)
        for other in (*zip(fake, want, strict=True), *zip(meta, want, strict=True)):
            assert len({(t.shape, t.stride(), t.dtype) for t in other}) == 1


@native
def test_compiled_is_the_same():
    torch._dynamo.reset()
    _, weight, bias, state = (t.requires_grad_() for t in inputs(2, 5, 3, 4))

    def call(x, bias, state):
        return onchip.causal_conv1d(x, weight, bias, initial_state=state, activation="silu", return_final_state=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (7, 9):
        x = torch.randn(2, length, 3, dtype=F64, requires_grad=True)
        results = [f(x, bias, state) for f in (compiled, call)]
        losses = [(out.square().sum() + final.sum()) for out, final in results]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        grads = [torch.autograd.grad(loss, (x, weight, bias, state)) for loss in losses]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@native
def test_a_compiled_step_is_the_same():
    torch._dynamo.reset()
    x, weight, bias, state = inputs(2, 5, 3, 4)
    place = state.clone()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x_t, place):
        return onchip.causal_conv1d_step(x_t, place, weight, bias, activation="silu", out_state=place)[0]

    for t in range(3):
        want, state = onchip.causal_conv1d_step(x[:, t], state, weight, bias, activation="silu")
        assert torch.equal(step(x[:, t], place), want) and torch.equal(place, state)


def test_a_step_has_gradients(target: Target):
    x, weight, bias, state = (t.requires_grad_() for t in inputs(2, 1, 3, 4, target.dtypes[0]))
    y, new = target.step(x[:, 0], state, weight, bias, activation="silu")
    got = torch.autograd.grad(y.sum() + new.pow(2).sum(), (x, weight, bias, state))
    window = torch.cat([state, x], 1)
    want = silu((window * weight.t()).sum(1) + bias).sum() + window[:, 1:].pow(2).sum()
    for g, w in zip(got, torch.autograd.grad(want, (x, weight, bias, state)), strict=True):
        torch.testing.assert_close(g, w)
