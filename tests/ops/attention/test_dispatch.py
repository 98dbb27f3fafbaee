"""Attention among PyTorch's own: the dispatcher, tracing, autocast; and which implementation serves."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import onchip
from onchip.ops import _native, _select

from .support import DIFFERENTIABLE, LOW, Case, differentiate, randn_case, run
from .tolerance import assert_same

CALLS = {
    "plain": lambda: randn_case(2, 5, 7, 4, kv_heads=2, value_dim=3),
    "everything": lambda: randn_case(
        2, 5, 7, 4, bias=torch.randn(4, 1, 7), alibi_slopes=torch.rand(2, 4), sinks=torch.randn(4), causal=True
    ),
    "boolean bias": lambda: randn_case(1, 5, 7, 2, bias=torch.rand(5, 7) < 0.7, window=(3, None), softcap=2.0),
    "packed": lambda: randn_case(
        9, 8, 2, cu_seqlens_q=torch.tensor([0, 2, 9]), cu_seqlens_k=torch.tensor([0, 8, 8], dtype=torch.int32)
    ),
    "dropout": lambda: randn_case(2, 5, 7, 4, kv_heads=2, dropout_p=0.5, seed=3, sinks=torch.randn(4)),
    "no sequence": lambda: randn_case(0, 3, 4, 2, sinks=torch.randn(2)),
}


def op_arguments(call: Case) -> tuple:
    """The call as the registered op takes it."""
    left, right = call["window"] or (None, None)
    ends = [-1 if end is None else end for end in (left, 0 if call["causal"] else right)]
    settings = (*ends, call["scale"] or 0.5, call["softcap"] or 0.0)
    starts = [call["cu_seqlens_q"], call["cu_seqlens_k"]]
    dropout = (call["dropout_p"] or 0.0, call["seed"] or 0)
    return (*(call[n] for n in "qkv"), *settings, *(call[n] for n in DIFFERENTIABLE[3:]), *starts, *dropout)


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
@pytest.mark.usefixtures("implementation")
def test_opcheck(make):
    call = make().to(torch.bfloat16)
    arguments = op_arguments(call)
    wanted = {f"{n}_grad": call[name] is not None and call[name].is_floating_point() for n, name in GRADS.items()}
    out, lse = torch.ops.onchip.attention(*arguments)
    backward = (call.grad_out, call.grad_lse, out, lse, *arguments)
    torch.library.opcheck(torch.ops.onchip.attention_backward.default, backward, wanted)
    for x in arguments:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.requires_grad_()
    torch.library.opcheck(torch.ops.onchip.attention.default, arguments)


GRADS = {"bias": "bias", "slopes": "alibi_slopes", "sinks": "sinks"}


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
def test_fake_and_meta_tensors_get_the_real_shapes(implementation, make, dtype):
    call = make().to(dtype)
    mode = FakeTensorMode()
    fakes = {n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in call.arguments.items()}
    metas = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in call.arguments.items()}
    real = run(call, implementation)
    with mode:
        fake = run(Case(fakes, mode.from_tensor(call.grad_out), mode.from_tensor(call.grad_lse)), implementation)
    meta = run(Case(metas, call.grad_out.to("meta"), call.grad_lse.to("meta")), implementation)
    for name, x in real.items():
        for other in (fake[name], meta[name]):
            assert (other.shape, other.stride(), other.dtype) == (x.shape, x.stride(), x.dtype), name


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
def test_compiled_is_the_same(implementation, make):
    call = make().to(torch.float32)
    compiled = torch.compile(onchip.attention_with_lse, fullgraph=True, backend="aot_eager")
    want = run(call, implementation)
    torch._dynamo.reset()
    assert_same(differentiate(call, compiled), want)


MORE = {"plain": {}, "scale and softcap": {"scale": 0.3, "softcap": 2.0}, "sinks": {"sinks": torch.randn(4)}}


@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
def test_compiled_once_for_all_lengths(implementation, more):
    compiled = torch.compile(onchip.attention, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.reset()
    for n, (tq, tk) in enumerate([(5, 9), (20, 31), (64, 60)]):
        call = randn_case(2, tq, tk, 4, kv_heads=2)
        arguments = [call["q"].requires_grad_(), call["k"], call["v"]]
        with torch._dynamo.config.patch(error_on_recompile=n > 0):
            out = compiled(*arguments, causal=True, **more)
        want = onchip.attention(*arguments, causal=True, backend=implementation, **more)
        assert torch.equal(out, want)
        assert torch.equal(*(torch.autograd.grad(x, call["q"], call.grad_out)[0] for x in (out, want)))


COMPILE = """
import torch, onchip
torch.manual_seed(0)
@torch.compile(fullgraph=True)
def block(x, w, sinks):
    q, k, v = (x @ w).unflatten(-1, (3, 4, 16)).unbind(2)
    out, lse = onchip.attention_with_lse(q * 2, k.sin(), v, causal=True, window=(50, 0), sinks=sinks)
    return out.flatten(2).relu().sum() + lse.exp().mean()
x, w, sinks = (t.requires_grad_() for t in (torch.randn(2, 100, 32), torch.randn(32, 192) / 6, torch.randn(4)))
loss = block(x, w, sinks)
want = block._torchdynamo_orig_callable(x, w, sinks)
torch.testing.assert_close(loss, want)
for a, b in zip(*(torch.autograd.grad(y, (x, w, sinks)) for y in (loss, want))):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
print("compiled")
"""


@pytest.mark.slow
def test_compiled_by_inductor_in_a_fresh_process():
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "compiled\n"


def test_export(implementation):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return onchip.attention_with_lse(q, k, v, causal=True, softcap=3.0)

    call = randn_case(2, 9, 12, 4, kv_heads=2, dtype=torch.float32)
    tensors = tuple(call[n] for n in "qkv")
    time_q, time_k = torch.export.Dim("tq", min=2, max=512), torch.export.Dim("tk", min=2, max=512)
    exported = torch.export.export(Module(), tensors, dynamic_shapes=({1: time_q}, {1: time_k}, {1: time_k}))
    longer = tuple(torch.randn(2, n, *x.shape[2:]) for n, x in zip((33, 40, 40), tensors, strict=True))
    for inputs in (tensors, longer):
        want = onchip.attention_with_lse(*inputs, causal=True, softcap=3.0, backend=implementation)
        assert all(map(torch.equal, exported.module()(*inputs), want))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(implementation, dtype):
    call = randn_case(1, 9, 12, 2, dtype=torch.float32)
    q, k, v = (call[n].requires_grad_() for n in "qkv")
    with torch.autocast("cpu", dtype):
        out = onchip.attention(q, k.to(dtype), v, backend=implementation)
        assert onchip.attention(q.double(), k.double(), v.double(), backend=implementation).dtype == torch.float64
    want = onchip.attention(*(x.to(dtype) for x in (q, k, v)), backend=implementation)
    assert out.dtype == dtype and torch.equal(out, want)
    grads = [torch.autograd.grad(x, (q, k, v), call.grad_out.to(dtype)) for x in (out, want)]
    assert all(g.dtype == torch.float32 for g in grads[0])
    assert all(map(torch.equal, *grads))


def test_autocast_inside_a_compiled_function(implementation):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q):
        with torch.autocast("cpu", torch.bfloat16):
            cast = onchip.attention(q, q, q)
        return cast, onchip.attention(q, q, q)

    torch._dynamo.reset()
    q = torch.randn(1, 9, 2, 8)
    for out, x in zip(compiled(q), (q.bfloat16(), q), strict=True):
        assert torch.equal(out, onchip.attention(x, x, x, backend=implementation))


def test_without_gradients_the_same_bits(implementation):
    call = randn_case(1, 9, 12, 2)
    q = call["q"].requires_grad_()
    want = onchip.attention(q, call["k"], call["v"], backend=implementation)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = onchip.attention(q, call["k"], call["v"], backend=implementation)
        assert torch.equal(out, want) and not out.requires_grad


def wide(dim: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(1, 3, 1, dim), torch.randn(1, 3, 1, dim), torch.randn(1, 3, 1, 8)


@pytest.fixture
def nothing_warned(monkeypatch):
    monkeypatch.setattr(_select, "_WARNED", set())


@pytest.fixture
def no_kernels(monkeypatch, nothing_warned):
    monkeypatch.setattr(_native, "missing", "the native kernels are on holiday")


@pytest.mark.usefixtures("no_kernels")
def test_missing_kernels_are_said_once():
    q, k, v = wide(8)
    with pytest.warns(UserWarning, match="attention runs on its slow reference: the native kernels are on holiday"):
        out = onchip.attention(q, k, v)
    assert torch.equal(out, onchip.attention(q, k, v, backend="reference"))
    onchip.attention_with_lse(q, k, v)  # a second warning would be an error here


@pytest.mark.usefixtures("no_kernels")
def test_an_explicit_request_never_falls_back():
    with pytest.raises(ValueError, match="backend='cpu' cannot serve this call: the native kernels are on holiday"):
        onchip.attention(*wide(8), backend="cpu")


@pytest.mark.usefixtures("no_kernels")
def test_asking_for_the_reference_is_silent():
    onchip.attention(*wide(8), backend="reference")


def test_head_dims_beyond_the_kernels(implementation, nothing_warned):
    with pytest.raises(ValueError, match="head dims go to 512, got 513 for q and k, 8 for v"):
        onchip.attention(*wide(513), backend=implementation)
    with pytest.warns(UserWarning, match="slow reference.*512, got 513"):
        out = onchip.attention(*wide(513))
    assert out.shape == (1, 3, 1, 8)
    onchip.attention(*wide(512))


def test_explain(implementation):
    explanation = onchip.explain(onchip.attention, *wide(64), causal=True)
    assert explanation.chosen == implementation == "cpu"
    assert str(explanation).splitlines() == [
        "attention",
        "→ cpu        serves",
        "  triton     cannot serve: it runs on GPUs, and the call's tensors are on cpu",
        "  reference  serves",
    ]
    too_wide = onchip.explain(onchip.attention_with_lse, *wide(513))
    assert too_wide.chosen == "reference"
    assert "cannot serve: head dims go to 512, got 513" in str(too_wide)
    assert onchip.explain(onchip.attention, *wide(513), backend="cpu").chosen is None
    assert onchip.explain(onchip.attention, v=wide(8)[2], k=wide(513)[1], q=wide(513)[0]).chosen == "reference"


def test_explain_without_kernels(no_kernels):
    explanation = onchip.explain(onchip.attention, *wide(8))
    assert explanation.chosen == "reference"
    assert "cannot serve: the native kernels are on holiday" in str(explanation)


def test_explain_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match=r"one of onchip's functions that take backend= \(attention, .*hadamard.*\)"):
        onchip.explain(torch.nn.functional.scaled_dot_product_attention, *wide(8))
    with pytest.raises(TypeError, match="dropout"):
        onchip.explain(onchip.attention, *wide(8), dropout=0.1)
