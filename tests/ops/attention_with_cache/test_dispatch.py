"""Attention over a cache among PyTorch's own: the dispatcher, tracing, mutation; and which implementation serves."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import onchip
from onchip.ops import _native

from .support import Cached, cached, run

LOW = (torch.float32, torch.bfloat16)
BACKENDS = ("reference",) if _native.missing else ("cpu", "reference")
ROTARY = torch.rand(60, 4), torch.rand(60, 4)
CALLS = {
    "paged": lambda dtype: cached([0, 9], 3, page_size=4, dtype=dtype, rotary=ROTARY, sinks=torch.randn(4)),
    "turned from elsewhere": lambda dtype: cached(
        [4, 9], 3, dtype=dtype, rotary=ROTARY, rotary_seqlens=torch.tensor([7, 40])
    ),
    "contiguous": lambda dtype: cached([0, 9], 1, dtype=dtype, dims=(16, 8), softcap=2.0),
    "nothing appended": lambda dtype: cached(
        [2, 9], 3, added=0, page_size=4, dtype=dtype, alibi_slopes=torch.rand(2, 4)
    ),
}
every_call = pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)


def finite(call: Cached) -> Cached:
    """Zeros where no key is: NaN is not equal to itself."""
    caches = {n: call[n].nan_to_num() for n in ("k_cache", "v_cache")}
    return Cached(call.arguments | caches, call.keys, call.values)


@every_call
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(make, dtype, backend):
    call = finite(make(dtype))
    tensors = [call[n] for n in ("q", "k_cache", "v_cache", "k", "v", "cache_seqlens", "cache_leftpad", "block_table")]
    settings = (-1, 0, 0.5, call["softcap"] or 0.0, call["alibi_slopes"], call["sinks"], False, backend)
    arguments = (*tensors, *(call["rotary"] or (None, None)), call["rotary_seqlens"], True, *settings)
    torch.library.opcheck(torch.ops.onchip.attention_with_cache.default, arguments)


@every_call
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_is_the_same(make, backend):
    call = finite(make(torch.float32))
    want = run(call, backend)
    torch._dynamo.reset()
    compiled = torch.compile(onchip.attention_with_cache_and_lse, fullgraph=True, backend="aot_eager")
    caches = {n: call[n].clone() for n in ("k_cache", "v_cache")}
    got = (*compiled(**(call.arguments | caches), backend=backend), *caches.values())
    assert all(map(torch.equal, got, want))


@every_call
@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
def test_fake_and_meta_tensors_get_the_real_shapes(make, dtype):
    call, mode = make(dtype), FakeTensorMode()

    def moved(move):
        change = lambda x: move(x) if isinstance(x, torch.Tensor) else x  # noqa: E731
        return {n: tuple(map(change, x)) if n == "rotary" else change(x) for n, x in call.arguments.items()}

    real = run(call, BACKENDS[0])
    with mode:
        fake = onchip.attention_with_cache_and_lse(**moved(mode.from_tensor))
    meta = onchip.attention_with_cache_and_lse(**moved(lambda x: x.to("meta")))
    for x, *others in zip(real, fake, meta, strict=False):
        for other in others:
            assert (other.shape, other.stride(), other.dtype) == (x.shape, x.stride(), x.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["q", "k_cache", "k", "sinks"])
def test_a_gradient_is_refused(backend, name):
    call = cached([0, 9], 3, page_size=4, sinks=torch.randn(4))
    call[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"with respect to {name} is asked for: onchip.attention has gradients"):
        onchip.attention_with_cache(**call.arguments, backend=backend)
    with torch.no_grad():
        onchip.attention_with_cache(**call.arguments, backend=backend)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # what PyTorch loads for it
def test_a_tangent_is_refused():
    call = cached([0, 9], 3)
    with forward_ad.dual_level():
        q = forward_ad.make_dual(call["q"], call["q"])
        with pytest.raises(RuntimeError, match="with respect to q is asked for"):
            onchip.attention_with_cache(**(call.arguments | {"q": q}))


def test_autograd_sees_what_is_written():
    """A cache that autograd has saved, and that is written to afterwards, is an error and not a wrong gradient."""
    call, x = cached([0, 9], 3), torch.ones((), requires_grad=True)
    product = (call["k_cache"].nan_to_num_() * x).sum()
    before = call["k_cache"]._version
    onchip.attention_with_cache(**call.arguments)
    assert call["k_cache"]._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_inference_mode(backend):
    call = cached([0, 9], 3, page_size=4)
    want = run(call, backend)
    with torch.inference_mode():
        for got in (
            run(call, backend),
            run(Cached({n: x.clone() for n, x in call.arguments.items()}, [], []), backend),
        ):
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_autocast_follows_the_cache():
    call = cached([0, 9], 3, page_size=4, dtype=torch.bfloat16)
    wide = {n: call[n].float() for n in ("q", "k", "v")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(Cached(call.arguments | wide, [], []), BACKENDS[0])
    assert got[0].dtype == torch.bfloat16
    for x, y in zip(got, run(call, BACKENDS[0]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_explain():
    call = cached([0, 9], 3, page_size=4)
    explained = onchip.explain(onchip.attention_with_cache, **call.arguments)
    assert explained.chosen == BACKENDS[0]
    assert explained.op == "attention_with_cache"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_lengths_are_read_once_until_they_change():
    call = cached([0, 9], 1, page_size=4)
    arguments = {n: x.cuda() for n, x in call.arguments.items()}
    onchip.attention_with_cache(**arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        onchip.attention_with_cache(**arguments)
        arguments["cache_seqlens"] += 1
        with pytest.raises(RuntimeError, match="synchroniz"):
            onchip.attention_with_cache(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
