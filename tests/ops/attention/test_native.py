"""Every kernel against the reference: in float64 over the whole space of calls, else at twice the error of eager."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import onchip

from . import cases
from .support import LOW, randn_case, run
from .tolerance import assert_exact, assert_twice_eager

F64 = torch.float64
FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (40, 7)},
    "softcap": {"softcap": 5.0, "causal": True},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1])},
    "sinks": {"sinks": torch.tensor([1.0, -2.0]), "window": (64, 0)},
}
LENGTHS = [(1, 1), (63, 63), (100, 100), (113, 203), (203, 113), (1, 239), (239, 1)]
LONG = [(1023, 1023), (1023, 1024), (1024, 1023)]


@given(call=cases.calls(F64))
@settings(max_examples=150)
def test_any_call(backend, call):
    assert_exact(run(call, backend), run(call, "reference"))


@given(call=cases.packed(F64))
@settings(max_examples=80)
def test_any_packed_call(backend, call):
    assert_exact(run(call, backend), run(call, "reference"))


@given(call=cases.decodes(F64))
@settings(max_examples=40)
def test_any_decode(backend, call):
    assert_exact(run(call, backend), run(call, "reference"))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@given(data=st.data())
@settings(max_examples=50)
def test_any_call_at_twice_eagers_error(backend, dtype, data):
    assert_twice_eager(data.draw(cases.calls(dtype)), backend)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@given(data=st.data())
@settings(max_examples=20)
def test_any_decode_at_twice_eagers_error(backend, dtype, data):
    assert_twice_eager(data.draw(cases.decodes(dtype)), backend)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("tq, tk", LENGTHS)
def test_lengths_at_twice_eagers_error(backend, tq, tk, feature):
    assert_twice_eager(randn_case(1, tq, tk, 2, kv_heads=1, dim=32, **FEATURES[feature]).to(torch.float32), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tq, tk", LENGTHS)
def test_16_bit_lengths_at_twice_eagers_error(backend, tq, tk, dtype):
    assert_twice_eager(randn_case(1, tq, tk, 2, kv_heads=1, dim=80, value_dim=64, causal=True).to(dtype), backend)


@pytest.mark.parametrize("feature", ["plain", "causal", "window"])
@pytest.mark.parametrize("tq, tk", LONG)
def test_long_lengths_at_twice_eagers_error(backend, tq, tk, feature):
    assert_twice_eager(randn_case(1, tq, tk, 2, kv_heads=1, dim=64, **FEATURES[feature]).to(torch.float32), backend)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("tq, tk", [(70, 90), (2, 1500)])
@pytest.mark.parametrize("feature", ["plain", "causal", "softcap"])
def test_logits_of_a_thousand_do_not_overflow(backend, feature, tq, tk, dtype):
    call = randn_case(1, tq, tk, 2, dim=64, **FEATURES[feature]).times(30).to(dtype)
    results = run(call, backend)
    assert feature == "softcap" or results["lse"].max() > 1000
    assert all(x.isfinite().all() for x in results.values())
    assert_twice_eager(call, backend)


@pytest.mark.parametrize("tq, tk", [(20, 20), (2, 300)])
@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "alibi_slopes", "sinks"])
@pytest.mark.parametrize("dtype", (F64, *LOW), ids=str)
def test_nan_shows_where_it_is_read(backend, name, tq, tk, dtype):
    more = {"bias": torch.randn(2, 1, tq, tk), "alibi_slopes": torch.rand(2, 4), "sinks": torch.randn(4)}
    call = randn_case(2, tq, tk, 4, kv_heads=2, dim=32, **more).to(dtype)
    x = call[name]
    x[tuple(n - 1 for n in x.shape)] = torch.nan
    got, want = run(call, backend), run(call, "reference")
    assert got["out"].isnan().any()
    for output in ("out", "lse"):
        assert torch.equal(got[output].isnan(), want[output].isnan())


EMPTY = {
    "no keys": (4, 0, {}),
    "no keys, decoding": (1, 0, {}),
    "causal, more queries than keys": (90, 30, {"causal": True}),
    "window to the right of the last key": (40, 8, {"window": (0, 0)}),
    "nothing to attend to": (5, 7, {"bias": torch.tensor(False)}),
    "some rows false": (70, 130, {"bias": torch.arange(70)[:, None] % 3 > 0}),
    "some rows -inf": (70, 130, {"bias": torch.where(torch.arange(70) % 3 > 0, 0.0, -torch.inf)[:, None].double()}),
    "a decoding step's row false": (2, 300, {"bias": torch.tensor([[True], [False]])}),
}


@pytest.mark.parametrize("tq, tk, more", EMPTY.values(), ids=EMPTY)
def test_a_row_that_sees_nothing(backend, tq, tk, more):
    results = run(randn_case(1, tq, tk, 2, dim=32, **more), backend)
    empty = results["lse"][0].T.isneginf()  # (Tq, H)
    assert empty.any()
    assert (results["out"][0][empty] == 0).all()
    assert (results["q"][0][empty] == 0).all()
    assert not any(x.isnan().any() for x in results.values())


@pytest.mark.parametrize("tq, tk", [(1, 0), (20, 0), (20, 9), (2, 300)])
@pytest.mark.parametrize("sink", [0.7, -torch.inf])
def test_a_row_that_sees_only_its_sink(backend, sink, tq, tk):
    bias = torch.tensor([True, False])[:, None, None].expand(2, tq, tk)
    call = randn_case(1, tq, tk, 2, sinks=torch.full((2,), sink, dtype=F64), bias=bias, causal=True)
    results = run(call, backend)
    assert (results["out"][0, :, 1] == 0).all()
    assert_exact(results, run(call, "reference"))


def test_the_lowest_bias_hides_a_key_as_minus_infinity_does(backend):
    bias = torch.zeros(1, 1, 5, 9, dtype=F64)
    bias[..., :2, :] = bias[..., 3:] = torch.finfo(F64).min
    call = randn_case(1, 5, 9, 2, bias=bias)
    results = run(call, backend)
    assert (results["out"][:, :2] == 0).all() and results["lse"][..., :2].isneginf().all()
    assert_exact(results, run(call, "reference"))
    infinite = replace(call, arguments=call.arguments | {"bias": bias.masked_fill(bias < 0, -torch.inf)})
    assert_exact(results, run(infinite, backend))


def test_a_lazily_negated_view_is_read_with_its_sign(backend):
    q = torch.view_as_complex(torch.randn(1, 9, 2, 8, 2)).conj().imag
    assert q.is_neg()
    assert torch.equal(
        onchip.attention(q, q, q, backend=backend), onchip.attention(*[q.resolve_neg()] * 3, backend=backend)
    )


def test_outputs_are_contiguous_and_of_the_promised_dtypes(backend):
    for dtype in (F64, *LOW):
        q = torch.randn(2, 2, 5, 8).to(dtype).transpose(1, 2)
        out, lse = onchip.attention_with_lse(q, q, q, backend=backend)
        assert out.is_contiguous() and out.dtype == dtype
        assert lse.is_contiguous() and lse.dtype == (F64 if dtype == F64 else torch.float32)
