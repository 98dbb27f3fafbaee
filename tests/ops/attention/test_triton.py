"""The kernels in Triton: on a GPU where there is one, else interpreted, over the few tokens that allows."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import onchip
from onchip.ops import _triton

from . import cases
from .support import DIFFERENTIABLE, Case, lay_out, randn_case, run
from .test_gradients import gradients_of_everything
from .tolerance import assert_same, assert_twice_eager

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if (reason := _triton.limits(torch.device(DEVICE))) is not None:
    pytest.skip(reason, allow_module_level=True)
if not ON_GPU and not _triton.interpreted_on():
    pytest.skip("there is no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

triton = import_module("onchip.ops.attention.triton")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16) if ON_GPU else (F32, F16)  # interpreted, bfloat16 is multiplied wrongly

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # NumPy's, where NaN is wanted
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # in the interpreter of Triton 3.6
]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)


FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (40, 7)},
    "softcap": {"softcap": 5.0, "causal": True},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1])},
    "sinks": {"sinks": torch.tensor([1.0, -2.0]), "window": (64, 0)},
    "a negative scale": {"scale": -0.3, "causal": True},
    "no scale": {"scale": 0.0, "window": (5, 5)},
}
FEW = [(1, 1), (63, 63), (33, 130), (113, 60)]
MANY = [
    (113, 203),
    (128, 217),
    (113, 211),
    (108, 256),
    (256, 512),
    (512, 256),
    (1024, 1024),
    (1023, 1024),
    (1024, 1023),
]
MANY += [(2048, 2048), (1, 147), (1, 239), (3, 799), (127, 512), (127, 513), (64, 800), (3, 1024), (64, 2048), (239, 1)]
LENGTHS = FEW + MANY if ON_GPU else FEW
HEAD_DIMS = (16, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256) if ON_GPU else (16, 40, 59, 96, 256)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("tq, tk", LENGTHS)
def test_features(tq, tk, feature):
    assert_twice_eager(randn_case(1, tq, tk, 2, kv_heads=1, dim=32, dtype=F32, **FEATURES[feature]), "triton")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("feature", FEATURES if ON_GPU else ["causal", "softcap"])
@pytest.mark.parametrize("tq, tk", LENGTHS if ON_GPU else [(70, 90)])
def test_features_in_16_bits(tq, tk, feature, dtype):
    more = {n: x.to(dtype) if isinstance(x, torch.Tensor) else x for n, x in FEATURES[feature].items()}
    call = randn_case(2, tq, tk, 2, kv_heads=1, dim=64, dtype=F32, **more).to(dtype)
    assert_twice_eager(call, "triton")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_head_dims(dim, dtype):
    lengths = (300, 400) if ON_GPU else (33, 66)
    for value_dim in {dim, 24}:
        call = randn_case(1, *lengths, 2, dim=dim, value_dim=value_dim, causal=True, dtype=F32).to(dtype)
        assert_twice_eager(call, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@settings(max_examples=5)  # on a GPU each may compile five kernels
def test_any_call(dtype, data):
    assert_twice_eager(data.draw(cases.short_calls(dtype)), "triton")


BIASES = {
    "dense": lambda: torch.randn(2, 4, 40, 70),
    "for all sequences": lambda: torch.randn(4, 40, 70),
    "for all heads": lambda: torch.randn(2, 1, 40, 70),
    "for all sequences and heads": lambda: torch.randn(40, 70),
    "per key": lambda: torch.randn(2, 1, 1, 70),
    "per head and query": lambda: torch.randn(4, 40, 1),
    "per head": lambda: torch.randn(4, 1, 1),
    "one": lambda: torch.randn(1),
    "boolean": lambda: torch.rand(2, 1, 40, 70) < 0.6,
    "some -inf": lambda: torch.randn(40, 70).masked_fill(torch.rand(40, 70) < 0.3, -torch.inf),
}


@pytest.mark.parametrize("make", BIASES.values(), ids=BIASES)
def test_bias(make):
    call = randn_case(2, 40, 70, 4, kv_heads=2, dim=16, dtype=F32, bias=make(), window=(50, None))
    assert_twice_eager(call, "triton")


def test_everything_at_once():
    call = gradients_of_everything(
        2, 40, 70, 4, kv_heads=2, dim=24, value_dim=40, window=(50, 3), softcap=3.0, alibi_slopes=torch.rand(2, 4)
    ).to(F32)
    assert_twice_eager(call, "triton")


@pytest.mark.parametrize("more", [{}, {"window": (700, 0)}, {"bias": True}], ids=["plain", "window", "everything"])
@pytest.mark.parametrize("tq, heads, kv_heads", [(1, 8, 1), (3, 4, 2), (1, 2, 2)])
def test_decoding(tq, heads, kv_heads, more):
    """Few rows and many keys: shared out by keys and combined."""
    tk = 5000 if ON_GPU else 600
    if "bias" in more:
        more = {
            "bias": torch.randn(heads, 1, tk),
            "alibi_slopes": torch.rand(heads) * 0.01,
            "sinks": torch.randn(heads),
        }
    call = randn_case(1, tq, tk, heads, kv_heads=kv_heads, dim=32, value_dim=16, dtype=F32, **more)
    assert_twice_eager(call, "triton")


LENGTHS_PACKED = [((5, 33, 0, 40), None), ((30, 1, 7), (64, 0, 65)), ((1, 2, 1), (530, 3, 5))]


@pytest.mark.parametrize("lengths_q, lengths_k", LENGTHS_PACKED, ids=["self", "cross", "decoding"])
def test_packed_is_one_by_one(lengths_q, lengths_k):
    lengths_k = lengths_k or lengths_q
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in (lengths_q, lengths_k))
    call = randn_case(
        sum(lengths_q), sum(lengths_k), 4, kv_heads=2, dim=16, value_dim=24, dtype=F32, window=(80, 20),
        bias=torch.randn(len(lengths_q), 1, max(lengths_q), max(lengths_k)),
        alibi_slopes=torch.rand(len(lengths_q), 4) * 0.1, sinks=torch.randn(4),
        cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
    )  # fmt: skip
    together, gathered = run(call, "triton"), {n: torch.zeros_like(call[n]) for n in DIFFERENTIABLE}
    for b in range(len(lengths_q)):
        q, k = slice(*cu_q[b : b + 2].tolist()), slice(*cu_k[b : b + 2].tolist())
        tq, tk = q.stop - q.start, k.stop - k.start
        own = {"q": call["q"][None, q], "k": call["k"][None, k], "v": call["v"][None, k]}
        own |= {"bias": call["bias"][b : b + 1, :, :tq, :tk], "alibi_slopes": call["alibi_slopes"][b]}
        alone = run(
            Case(call.arguments | own | NOT_PACKED, call.grad_out[None, q], call.grad_lse[None, :, q]), "triton"
        )
        for name, part in (("out", q), ("q", q), ("k", k), ("v", k)):
            close(alone[name][0], together[name][part])
        close(alone["lse"][0], together["lse"][:, q])
        gathered["bias"][b : b + 1, :, :tq, :tk] += alone["bias"]
        gathered["alibi_slopes"][b] += alone["alibi_slopes"]
        gathered["sinks"] += alone["sinks"]
    for name in ("bias", "alibi_slopes", "sinks"):
        close(together[name], gathered[name])


NOT_PACKED = {"cu_seqlens_q": None, "cu_seqlens_k": None}


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same sums in another order."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (3,)], ids=["for all", "per sequence"])
def test_packed_slopes_and_a_bias_for_all(shape):
    cu = torch.tensor([0, 5, 5, 38])
    score = {"bias": torch.randn(33, 33), "alibi_slopes": torch.rand(*shape, 2), "sinks": torch.randn(2)}
    call = randn_case(38, 38, 2, dim=16, dtype=F32, cu_seqlens_q=cu, **score)
    want = run(call.to(torch.float64), "reference")
    for name, x in run(call, "triton").items():
        torch.testing.assert_close(
            x.double(), want[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_packed_nothing():
    for cu in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        results = run(randn_case(0, 0, 2, dtype=F32, cu_seqlens_q=cu, sinks=torch.randn(2)), "triton")
        assert results["out"].numel() == 0 and (results["sinks"] == 0).all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 2), (2, 0, 4, 2), (1, 3, 0, 2)], ids=["batch", "queries", "keys"])
def test_nothing(shape):
    call = randn_case(*shape, dtype=F32, sinks=torch.randn(2), bias=torch.randn(shape[1], shape[2]))
    assert_same(run(call, "triton"), {n: x.to(F32) for n, x in run(call.to(torch.float64), "reference").items()})


EMPTY = {
    "causal, more queries than keys": (90, 30, {"causal": True}),
    "window to the right of the last key": (40, 8, {"window": (0, 0)}),
    "some rows false": (35, 70, {"bias": torch.arange(35)[:, None] % 3 > 0}),
    "some rows -inf": (35, 70, {"bias": torch.where(torch.arange(35) % 3 > 0, 0.0, -torch.inf)[:, None]}),
    "some rows at the lowest number": (35, 70, {"bias": torch.full((35, 1), torch.finfo(F32).min)}),
    "decoding, a row false": (2, 600, {"bias": torch.tensor([[True], [False]])}),
}


@pytest.mark.parametrize("tq, tk, more", EMPTY.values(), ids=EMPTY)
def test_a_row_that_sees_nothing(tq, tk, more):
    results = run(randn_case(1, tq, tk, 2, dim=16, dtype=F32, **more), "triton")
    empty = results["lse"][0].T.isneginf()  # (Tq, H)
    assert empty.any()
    assert (results["out"][0][empty] == 0).all()
    assert (results["q"][0][empty] == 0).all()
    assert not any(x.isnan().any() for x in results.values())


@pytest.mark.parametrize("sink", [0.7, -torch.inf])
@pytest.mark.parametrize("tq, tk", [(20, 0), (20, 9), (2, 600)])
def test_a_row_that_sees_only_its_sink(tq, tk, sink):
    bias = torch.tensor([True, False])[:, None, None].expand(2, tq, tk)
    call = randn_case(1, tq, tk, 2, dtype=F32, sinks=torch.full((2,), sink), bias=bias, causal=True)
    results = run(call, "triton")
    assert (results["out"][0, :, 1] == 0).all()
    for name, want in run(call, "reference").items():
        close(results[name], want)


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "alibi_slopes", "sinks"])
def test_nan_shows_where_it_is_read(name):
    more = {"bias": torch.randn(2, 1, 20, 20), "alibi_slopes": torch.rand(2, 2), "sinks": torch.randn(2)}
    call = randn_case(2, 20, 20, 2, kv_heads=1, dim=16, dtype=F32, **more)
    call[name][tuple(n - 1 for n in call[name].shape)] = torch.nan
    got, want = run(call, "triton"), run(call, "reference")
    assert got["out"].isnan().any()
    for output in ("out", "lse"):
        assert torch.equal(got[output].isnan(), want[output].isnan())


@pytest.mark.parametrize("feature", ["plain", "softcap"])
def test_logits_of_a_thousand_do_not_overflow(feature):
    call = randn_case(1, 40, 70, 2, dim=64, dtype=F32, **FEATURES[feature]).times(30)
    results = run(call, "triton")
    assert feature == "softcap" or results["lse"].max() > 1000
    assert all(x.isfinite().all() for x in results.values())
    assert_twice_eager(call, "triton")


@pytest.mark.parametrize("how", ["heads first", "dim outermost", "every other", "inside a larger tensor"])
def test_strides_change_no_bit(how):
    score = {"bias": torch.randn(4, 1, 50), "alibi_slopes": torch.rand(2, 4), "sinks": torch.randn(4)}
    call = randn_case(2, 40, 50, 4, kv_heads=2, dim=16, dtype=F32, **score)
    strided = {n: lay_out(call[n], how) for n in DIFFERENTIABLE}
    other = Case(call.arguments | strided, lay_out(call.grad_out, how), lay_out(call.grad_lse, how))
    assert_same(run(other, "triton"), run(call, "triton"))


@pytest.mark.parametrize("tq, tk", [(40, 70), (1, 600)], ids=["forward", "decoding"])
def test_the_rest_of_the_batch_changes_no_bit(tq, tk):
    call = randn_case(3, tq, tk, 2, kv_heads=1, dim=16, dtype=F32, causal=True)
    call["q"][0] = torch.nan
    call["k"][2] = torch.inf
    one = {n: call[n][1:2] for n in "qkv"}
    alone = run(Case(call.arguments | one, call.grad_out[1:2], call.grad_lse[1:2]), "triton")
    assert_same({n: x[1:2] for n, x in run(call, "triton").items()}, alone)


@pytest.mark.parametrize("dtype", DTYPES if ON_GPU else (F32,), ids=str)
@pytest.mark.parametrize("tq, tk", [(300, 500), (1, 5000)] if ON_GPU else [(40, 70), (1, 600)])
def test_the_same_bits_on_every_run(tq, tk, dtype):
    score = {"bias": torch.randn(4, 1, tk), "alibi_slopes": torch.rand(2, 4), "sinks": torch.randn(4)}
    dim = 128 if ON_GPU else 16
    calls = [
        randn_case(2, tq, tk, 4, kv_heads=2, dim=dim, dtype=F32, causal=True, **score).to(dtype),
        randn_case(2, tq, tk, 4, kv_heads=2, dim=dim, dtype=F32, causal=True).to(dtype),
    ]
    for call in calls:
        want = run(call, "triton")
        for _ in range(100 if ON_GPU else 1):
            assert_same(run(call, "triton"), want)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_only_what_is_asked_for(name):
    call = gradients_of_everything(1, 20, 30, 2, dim=16).to(F32)
    placed = call.on(DEVICE)
    alone = {n: placed[n].requires_grad_(n == name) for n in DIFFERENTIABLE}
    outputs = onchip.attention_with_lse(**(placed.arguments | alone), backend="triton")
    torch.autograd.backward(outputs, (placed.grad_out, placed.grad_lse))
    assert torch.equal(alone[name].grad.cpu(), run(call, "triton")[name])
    assert [n for n in DIFFERENTIABLE if alone[n].grad is not None] == [name]


def test_gradients_of_one_element_for_all():
    """What `out.sum().backward()` sends: a gradient without memory of its own."""
    call = randn_case(1, 20, 30, 2, dim=16, dtype=F32)
    ones = replace(call, grad_out=torch.ones_like(call.grad_out), grad_lse=torch.ones_like(call.grad_lse))
    one = torch.ones(())
    flat = replace(call, grad_out=one.expand_as(call.grad_out), grad_lse=one.expand_as(call.grad_lse))
    assert_same(run(flat, "triton"), run(ones, "triton"))


def test_opcheck():
    arguments = [x.requires_grad_() for x in (torch.randn(1, n, 2, 16, device=DEVICE) for n in (5, 7, 7))]
    settings = (
        -1,
        0,
        0.25,
        0.0,
        torch.randn(5, 7, device=DEVICE).requires_grad_(),
        None,
        None,
        None,
        None,
        0.5,
        7,
        None,
        None,
        "triton",
    )
    torch.library.opcheck(torch.ops.onchip.attention.default, (*arguments, *settings))


def test_boundaries_that_change_are_checked_again():
    cu, x = torch.tensor([0, 3, 8], device=DEVICE), torch.randn(8, 1, 16, device=DEVICE)
    for _ in range(2):
        onchip.attention(x, x, x, cu_seqlens_q=cu, backend="triton")
    cu[1] = 9
    with pytest.raises(ValueError, match="cu_seqlens_q must not descend, got 9 followed by 8"):
        onchip.attention(x, x, x, cu_seqlens_q=cu, backend="triton")


def test_what_it_cannot_serve():
    wide, narrow = torch.randn(1, 3, 1, 257), torch.randn(1, 3, 1, 8)
    with pytest.raises(
        ValueError, match="'triton' cannot serve this call: head dims go to 256, got 257 for q and k, 8"
    ):
        onchip.attention(wide, wide, narrow, backend="triton")
    with pytest.raises(ValueError, match="cannot serve this call: it computes in float32, and the call is in float64"):
        onchip.attention(narrow.double(), narrow.double(), narrow.double(), backend="triton")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(_triton, "missing", "Triton is not installed; pip install 'onchip[triton]' brings it")
    q = torch.randn(1, 3, 1, 8, device="meta")
    assert "pip install 'onchip[triton]'" in str(_triton.limits(q.device))
    explanation = onchip.explain(onchip.attention, *[torch.randn(1, 3, 1, 8, device=DEVICE)] * 3, backend="triton")
    assert explanation.chosen is None and "pip install 'onchip[triton]'" in str(explanation)


def test_an_old_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    refusal = _triton.limits(torch.device("cuda"))
    assert refusal == "it needs compute capability 8.0 (Ampere) or newer, and the Tesla T4 has 7.5"


def test_not_on_the_cpu_unless_interpreted():
    code = "import torch, onchip; x = torch.randn(1, 3, 1, 8); onchip.attention(x, x, x, backend='triton')"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert "'triton' cannot serve this call: it runs on GPUs, and the call's tensors are on cpu" in done.stderr


def test_more_keys_than_were_read():
    """The host may know fewer keys than there are, where boundaries change behind its back: none is dropped."""
    launches = import_module("onchip.ops.attention.triton.launches")
    q, k, v = (torch.randn(1, n, 2, 16, device=DEVICE) for n in (1, 1100, 1100))
    out, lse = torch.empty_like(q), torch.empty(2, 1, device=DEVICE)
    cu_q, cu_k = (torch.tensor([0, n], device=DEVICE) for n in (1, 1100))
    settings = (-1, -1, 0.25, 0.0, None, None, None, cu_q, cu_k, (1, 600), _triton.architecture(q.device))
    for launch in launches.attend(launches.Call(q[0], k[0], v[0], *settings), out[0], lse):
        launch.run()
    close(out, onchip.attention(q, k, v, scale=0.25, backend="reference"))


on_a_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


@on_a_gpu
def test_more_than_two_billion_elements():
    """Offsets of 64 bits: rows at the end of 2³¹ elements and more, forward and backward."""
    q, k, v = (torch.zeros(1, 1 << 19, 32, 130, dtype=BF16, device="cuda")[..., :128] for _ in range(3))
    last = slice(-64, None)
    for x in (q, k, v):
        x[:, last] = torch.randn(1, 64, 32, 128, device="cuda")
    weight = torch.zeros_like(q)
    weight[:, -32:] = torch.randn(1, 32, 32, 128, device="cuda")
    few = [x[:, last].float().requires_grad_() for x in (q, k, v)]
    tensors = [x.requires_grad_() for x in (q, k, v)]
    out = onchip.attention(*tensors, window=(32, 0), backend="triton")
    want = onchip.attention(*few, window=(32, 0), backend="reference")
    torch.testing.assert_close(out[:, -32:].float(), want[:, -32:], rtol=2e-2, atol=2e-2)
    got_grads = torch.autograd.grad(out, tensors, weight)
    for got, grad in zip(got_grads, torch.autograd.grad(want, few, weight[:, last].float()), strict=True):
        torch.testing.assert_close(got[:, last].float(), grad, rtol=5e-2, atol=5e-2)


@on_a_gpu
@pytest.mark.parametrize("lengths", [(300, 500), (1, 799)], ids=str)
def test_in_a_cuda_graph(lengths):
    """Captured with some boundaries, replayed with others."""
    cu, x = torch.tensor([0, 400, 800], device="cuda"), torch.randn(800, 2, 64, device="cuda")
    onchip.attention(x, x, x, cu_seqlens_q=cu, causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = onchip.attention(x, x, x, cu_seqlens_q=cu, causal=True)
    cu.copy_(torch.tensor([0, lengths[0], 800]))
    x.normal_()
    graph.replay()
    torch.testing.assert_close(out, onchip.attention(x, x, x, cu_seqlens_q=cu.clone(), causal=True))


@on_a_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_on_a_gpu(mode):
    call = randn_case(1, 70, 90, 4, kv_heads=2, dim=64, dtype=F32, causal=True, sinks=torch.randn(4)).on("cuda")
    compiled = torch.compile(onchip.attention_with_lse, fullgraph=True, mode=mode)
    for _ in range(3):
        for got, want in zip(compiled(**call.arguments), onchip.attention_with_lse(**call.arguments), strict=True):
            assert torch.equal(got, want)
