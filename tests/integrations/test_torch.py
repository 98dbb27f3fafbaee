"""onchip in the place of PyTorch's scaled_dot_product_attention: the same results for all that it takes."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from onchip.integrations import torch as integration
from onchip.integrations.torch import scaled_dot_product_attention, sdpa_through_onchip

F64 = torch.float64


def drawn(*shapes, dtype=F64):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def assert_as_pytorch(leaves, mask=None, **more):
    """The same output and gradients, the mask's among them where it is floating."""
    masks = [] if mask is None else [mask]
    wanted = [x for x in (*leaves, *masks) if x.requires_grad]
    results = []
    for attend in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        out = attend(*leaves, *masks, **more)
        if not results:
            weights = torch.randn_like(out)
        results.append((out, *torch.autograd.grad(out, wanted, weights)))
    for which, (got, want) in enumerate(zip(*results, strict=True)):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=lambda text, n=which: f"result {n}: {text}")


@given(st.data())
def test_all_that_pytorch_takes(data):
    batch = data.draw(st.sampled_from([(), (2,), (2, 3), (2, 1, 2)]), "batch")
    tq, tk = data.draw(st.integers(1, 9), "L"), data.draw(st.integers(1, 9), "S")
    heads, kv_heads = data.draw(st.sampled_from([(2, 2), (4, 2), (3, 1)]), "heads")
    leaves = drawn((*batch, heads, tq, 8), (*batch, kv_heads, tk, 8), (*batch, kv_heads, tk, 6))
    more = {"enable_gqa": heads != kv_heads, "scale": data.draw(st.sampled_from([None, 0.3]))}
    mask = None
    match data.draw(st.sampled_from(["none", "causal", "bool", "float"]), "mask"):
        case "causal":
            more["is_causal"] = True
        case ("bool" | "float") as kind:
            full = (*batch, heads, tq, tk)
            kept = data.draw(st.integers(0 if len(full) < 4 else 2, len(full) - 2))
            shape = tuple(n if data.draw(st.booleans()) else 1 for n in full[kept:-2])
            shape = (*shape, tq, tk)
            mask = torch.rand(shape) < 0.7 if kind == "bool" else torch.randn(shape, dtype=F64, requires_grad=True)
            if kind == "bool":
                mask[..., 0] = True  # what a row that sees nothing is worth is another test
    assert_as_pytorch(leaves, mask, **more)


@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 8), (5, 8), (5, 6)),
        ((2, 3, 8), (2, 5, 8), (2, 5, 6)),
        ((2, 4, 3, 8), (1, 4, 5, 8), (1, 4, 5, 6)),
        ((2, 4, 3, 8), (2, 1, 5, 8), (2, 1, 5, 6)),
        ((2, 4, 3, 8), (4, 5, 8), (5, 6)),
        ((2, 4, 3, 8), (2, 4, 0, 8), (2, 4, 0, 6)),
        ((2, 0, 4, 3, 8), (2, 0, 4, 5, 8), (2, 0, 4, 5, 6)),
    ],
)
def test_leading_dimensions(shapes):
    assert_as_pytorch(drawn(*shapes))


@pytest.mark.parametrize("tq, tk", [(5, 5), (3, 7), (7, 3), (1, 6), (6, 1)])
def test_causal_is_aligned_top_left(tq, tk):
    q, k, v = drawn((1, 2, tq, 8), (1, 2, tk, 8), (1, 2, tk, 8))
    by_mask = F.scaled_dot_product_attention(q, k, v, torch.ones(tq, tk, dtype=torch.bool).tril())
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, is_causal=True), by_mask)
    mask = torch.rand(1, 2, tq, tk) < 0.5
    mask[..., 0] = True
    both = F.scaled_dot_product_attention(q, k, v, mask & torch.ones(tq, tk, dtype=torch.bool).tril())
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask, is_causal=True), both)
    over_keys = torch.randn(tq, 1, dtype=F64)  # the same for each key, so of no effect
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, over_keys, is_causal=True), by_mask)


@pytest.mark.parametrize("tq, tk", [(5, 5), (3, 7)])
def test_causal_bias(tq, tk):
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    for make in (causal_upper_left, causal_lower_right):
        q, k, v = drawn((1, 2, tq, 8), (1, 2, tk, 8), (1, 2, tk, 8))
        want = F.scaled_dot_product_attention(q, k, v, make(tq, tk)._materialize())
        torch.testing.assert_close(scaled_dot_product_attention(q, k, v, make(tq, tk)), want)
        with sdpa_through_onchip():
            torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, make(tq, tk)), want)
    with pytest.raises(ValueError, match="CausalBias for lengths"):
        scaled_dot_product_attention(q, k, v, causal_upper_left(tq, tk + 1))
    with pytest.raises(ValueError, match="is_causal must be False"):
        scaled_dot_product_attention(q, k, v, causal_upper_left(tq, tk), is_causal=True)


@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
def test_rows_that_see_nothing_are_zero(kind):
    q, k, v = drawn(*[(1, 2, 4, 8)] * 3)
    mask = torch.tensor([1, 0, 1, 1], dtype=torch.bool)[:, None].expand(4, 4)
    mask = mask if kind == torch.bool else torch.zeros(4, 4, dtype=F64).masked_fill(~mask, -torch.inf)
    assert_as_pytorch((q, k, v), mask)
    assert (scaled_dot_product_attention(q, k, v, mask)[..., 1, :] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "causal", "float"])
def test_low_precision(dtype, kind):
    leaves = drawn((2, 3, 63, 32), (2, 3, 100, 32), (2, 3, 100, 32), dtype=dtype)
    mask = torch.randn(2, 1, 63, 100).to(dtype) if kind == "float" else None
    results, weights = [], torch.randn(2, 3, 63, 32).to(dtype)
    for attend, wide in (
        (scaled_dot_product_attention, False),
        (F.scaled_dot_product_attention, False),
        (F.scaled_dot_product_attention, True),
    ):
        inputs = [x.detach().to(F64 if wide else dtype).requires_grad_() for x in leaves]
        its_mask = mask if mask is None else mask.to(inputs[0].dtype)
        with sdpa_kernel(SDPBackend.MATH):
            out = attend(*inputs, its_mask, is_causal=kind == "causal")
        results.append((out, *torch.autograd.grad(out, inputs, weights.to(out.dtype))))
    for got, plain, exact in zip(*results, strict=True):
        error, plains = ((x.double() - exact).abs().max() for x in (got, plain))
        assert error <= 2 * plains + 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_autocast():
    leaves = drawn(*[(1, 2, 5, 8)] * 3, dtype=torch.float32)
    mask = torch.randn(5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (f(*leaves, mask) for f in (scaled_dot_product_attention, F.scaled_dot_product_attention))
    assert got.dtype == want.dtype == torch.bfloat16
    exact = F.scaled_dot_product_attention(*(x.double() for x in leaves), mask.double())
    error, theirs = ((x - exact).abs().max() for x in (got, want))
    assert error <= 2 * theirs + 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(got.sum(), (*leaves, mask)))


def spied(monkeypatch):
    """Where onchip's attention notes that it ran."""
    calls, real = [], integration.attention

    def attention(*args, **more):
        calls.append(args[0].shape)
        return real(*args, **more)

    monkeypatch.setattr(integration, "attention", attention)
    return calls


def test_existing_calls_run_through_onchip(monkeypatch):
    calls = spied(monkeypatch)
    q, k, v = drawn((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8))
    arguments = {"query": q, "key": k, "value": v, "is_causal": True, "enable_gqa": True, "scale": 0.5}
    want = F.scaled_dot_product_attention(**arguments)
    with sdpa_through_onchip():
        got = F.scaled_dot_product_attention(**arguments)
        assert calls == [(2, 5, 4, 8)]
        again = torch.nn.functional.scaled_dot_product_attention(q, k, v, None, 0.0, True, enable_gqa=True, scale=0.5)
    assert torch.equal(got, again)
    torch.testing.assert_close(got, want)
    F.scaled_dot_product_attention(**arguments)
    assert len(calls) == 2  # none after the context's end


@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder(monkeypatch, training):
    calls = spied(monkeypatch)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, dtype=F64)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    x, padding = torch.randn(2, 5, 16, dtype=F64), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.set_grad_enabled(training):
        for more in ({}, {"src_key_padding_mask": padding}, {"mask": torch.ones(5, 5, dtype=torch.bool).triu(1)}):
            want, kept = encoder(x, **more), ~padding if "src_key_padding_mask" in more else slice(None)
            calls.clear()
            with sdpa_through_onchip():
                got = encoder(x, **more)
            assert len(calls) == 2
            torch.testing.assert_close(got[kept], want[kept], rtol=1e-10, atol=1e-10)


def test_multi_head_attention(monkeypatch):
    calls = spied(monkeypatch)
    module, x = nn.MultiheadAttention(16, 4, batch_first=True, dtype=F64), torch.randn(2, 5, 16, dtype=F64)
    results = []
    for context in (sdpa_through_onchip(), torch.enable_grad()):
        with context:
            out, _ = module(x, x, x, need_weights=False)
        results.append((out, *torch.autograd.grad(out.square().sum(), tuple(module.parameters()))))
    assert len(calls) == 1
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    with sdpa_through_onchip():
        module(x, x, x)  # with weights there is no such call to take over
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_cannot_be_served_raises_unless_asked():
    q = torch.randn(1, 2, 4, 8)
    nested = torch.nested.nested_tensor([torch.randn(3, 2, 8), torch.randn(5, 2, 8)], layout=torch.jagged).transpose(
        1, 2
    )
    with pytest.raises(NotImplementedError, match="nested"):
        scaled_dot_product_attention(nested, nested, nested)
    with sdpa_through_onchip(), pytest.raises(NotImplementedError, match="nested"):
        F.scaled_dot_product_attention(nested, nested, nested)
    with sdpa_through_onchip(fallback=True):
        with pytest.warns(UserWarning, match=r"runs in PyTorch: .*nested"):
            got = F.scaled_dot_product_attention(nested, nested, nested, scale=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            F.scaled_dot_product_attention(q, q, q)
    want = F.scaled_dot_product_attention(nested, nested, nested, scale=0.1)
    assert torch.equal(got.values(), want.values())


@pytest.mark.parametrize("entered", ["inside", "outside"])
def test_compiles_whole(entered):
    q, k, v = drawn((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8))
    graphs = []

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def within(q, k, v):
        with sdpa_through_onchip():
            return attend(q, k, v)

    def look(graph, inputs):
        graphs.append(graph.code)
        return graph

    want = attend(q, k, v)
    if entered == "inside":
        got = torch.compile(within, backend=look, fullgraph=True)(q, k, v)
    else:
        with sdpa_through_onchip():
            got = torch.compile(attend, backend=look, fullgraph=True)(q, k, v)
    torch.testing.assert_close(got, want)
    assert "ops.onchip.attention" in graphs[0]
    assert "scaled_dot_product" not in graphs[0]


def test_multi_head_attention_within_a_compiled_function(monkeypatch):
    """PyTorch's compiler cannot trace it there: it breaks the graph, and onchip still serves."""
    calls = spied(monkeypatch)
    module, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 5, 16)
    call = torch.compile(lambda x: module(x, x, x, need_weights=False)[0], backend="eager")
    with torch.no_grad():
        with sdpa_through_onchip():
            got = call(x)
        assert len(calls) == 1
        torch.testing.assert_close(got, module(x, x, x, need_weights=False)[0])


X = torch.zeros(1, 2, 3, 8)


@pytest.mark.parametrize(
    "arguments, more, error, says",
    [
        ((X, X, X), {"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\], got -0.1"),
        ((X, X, X), {"is_causal": 1}, TypeError, "is_causal must be True or False, got 1"),
        ((X[0, 0, 0], X, X), {}, ValueError, "query must have at least 2 dimensions"),
        ((X, None, X), {}, TypeError, "key must be a tensor, got NoneType"),
        ((X, X[..., :4], X), {}, ValueError, r"key must have query's last dimension.*key \(1, 2, 3, 4\)"),
        ((X, X, X[:, :, :2]), {}, ValueError, "value key's last but one"),
        ((X.expand(1, 2, 3, 8), X.repeat(1, 2, 1, 1), X), {}, ValueError, "must be broadcastable.*enable_gqa=True"),
        ((X, X.repeat(2, 3, 1, 1), X), {"enable_gqa": True}, ValueError, "v must have k's"),
        ((X, X, X, torch.ones(4, 3, dtype=torch.bool)), {}, ValueError, r"attn_mask must .* \(1, 2, 3, 3\)"),
        ((X, X, X, torch.zeros(5, 1, 1, 3, 3)), {}, ValueError, "attn_mask must .* broadcastable"),
        ((X, X, X, torch.zeros(3)), {}, ValueError, "attn_mask must have 2 dimensions or more"),
        ((X, X, X, torch.ones(3, 3, dtype=torch.int64)), {}, TypeError, "floating or boolean, got torch.int64"),
        ((X, X, X, 3), {}, TypeError, "attn_mask must be a tensor, got int"),
        ((X, X.half(), X), {}, TypeError, "dtype"),
    ],
)
def test_bad_input(arguments, more, error, says):
    with pytest.raises(error, match=says):
        scaled_dot_product_attention(*arguments, **more)
