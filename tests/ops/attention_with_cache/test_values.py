"""Append, then attend, is attention on the whole: every backend, page size and feature."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import onchip
from onchip.nn.rotary import RotaryTable, rotate
from onchip.ops import _native

from ..attention.support import lay_out, threads
from .support import Cached, cached, check, check_cache, run, slot

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PAGES = (None, 1, 3, 16, 256)
RAGGED = [0, 7, 31, 16]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # NumPy's, where NaN is wanted
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # in the interpreter of Triton 3.6
]


@pytest.mark.parametrize("tq", [1, 5])
@pytest.mark.parametrize("page_size", PAGES)
def test_append_then_attend(backend, page_size, tq):
    check(cached(RAGGED, tq, page_size=page_size), backend)


FEATURES = {
    "not causal": {"causal": False},
    "window": {"window": (9, None)},
    "window on both sides": {"window": (5, 2), "causal": False},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.0, 0.3])},
    "alibi by row": {"alibi_slopes": torch.rand(3, 4)},
    "sinks": {"sinks": torch.tensor([1.0, -2.0, 0.0, 3.0])},
    "scale": {"scale": -0.3},
    "values of another width": {"dims": (16, 24)},
    "odd head dims": {"dims": (5, 3)},
    "one key head": {"heads": (4, 1)},
    "equal heads": {"heads": (3, 3)},
    "64-bit lengths": {"integers": torch.int64},
    "nothing appended": {"added": 0},
    "more queries than new keys": {"added": 1},
    "more new keys than queries": {"added": 8},
    "padding on the left": {"starts": [0, 6, 25]},
}


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(backend, feature, page_size):
    check(cached([0, 6, 30], 3, page_size=page_size, **FEATURES[feature]), backend)


@pytest.mark.parametrize("tq", [1, 40])
@pytest.mark.parametrize("dtype", [F16, BF16, F64], ids=str)
def test_dtypes(backend, dtype, tq):
    if backend == "triton" and (dtype == F64 or (dtype == BF16 and not torch.cuda.is_available())):
        pytest.skip("not one of its dtypes; interpreted, bfloat16 is multiplied wrongly")
    check(cached([3, 50], tq, page_size=8, dtype=dtype, dims=(32, 32)), backend)


def test_long_rows_are_split(backend):
    """Rows of more keys than a span or a split has, and of fewer."""
    check(cached([1100, 3, 600], 1, page_size=16, heads=(2, 1)), backend)
    check(cached([1100, 3, 600], 1, heads=(2, 1), window=(300, 0)), backend)


def test_a_prefill(backend):
    check(cached([0, 20], 130, page_size=16, heads=(2, 1)), backend)
    check(cached([0, 20], 130, page_size=16, heads=(2, 1), starts=[0, 9], window=(50, 0)), backend)


@pytest.mark.parametrize("layout", ["heads first", "inside a larger tensor", "every other", "dim outermost"])
def test_any_strides(backend, layout):
    call = cached([4, 9], 2, page_size=4)
    changed = {n: lay_out(call[n], layout) for n in ("q", "k", "v", "k_cache", "v_cache")}
    check(Cached(call.arguments | changed, call.keys, call.values), backend)
    strided = call["block_table"].T.contiguous().T
    check(Cached(call.arguments | {"block_table": strided}, call.keys, call.values), backend)


def test_rows_of_a_larger_cache(backend):
    """One large page a row: the table picks rows of the cache."""
    call = cached([4, 9], 2)
    rows = torch.tensor([3, 1])
    larger = {
        n: torch.full((5, *call[n].shape[1:]), torch.nan).index_copy(0, rows, call[n]) for n in ("k_cache", "v_cache")
    }
    check(Cached(call.arguments | larger | {"block_table": rows[:, None].int()}, call.keys, call.values), backend)


def test_rows_may_share_pages(backend):
    call = cached([16, 16], 1, page_size=8)
    table = call["block_table"].clone()
    table[1, :2] = table[0, :2]
    prefix = [x[0][:16] for x in (call.keys, call.values)]
    keys, values = (
        [rows[0], torch.cat([p, rows[1][16:]])] for p, rows in zip(prefix, (call.keys, call.values), strict=True)
    )
    check(Cached(call.arguments | {"block_table": table}, keys, values), backend)


@pytest.mark.parametrize("lengths, tq", [([], 1), ([0, 0], 1), ([3, 0], 0)], ids=["no rows", "no keys", "no queries"])
def test_nothing(backend, lengths, tq):
    for page_size in (None, 4):
        check(cached(lengths, tq, added=0, page_size=page_size), backend)
        if tq:
            check(cached(lengths, tq, page_size=page_size), backend)


def test_chunks_and_steps_are_one_pass(backend):
    """A prefill, a chunk and steps through one cache, with the rotary embedding, against attention on the whole."""
    q, k, v = torch.randn(3, 2, 24, 2, 16, dtype=F32).unbind(0)
    turns = RotaryTable(16)(24, like=q)
    want = onchip.attention(rotate(q, turns), rotate(k, turns), v, causal=True, backend="reference")
    k_cache, v_cache = torch.full((2, 16, 4, 2, 16), torch.nan).unbind(0)
    table = torch.randperm(16).view(2, 8).int()
    lengths, outs, rotary = torch.zeros(2, dtype=torch.int32), [], tuple(turns.unbind(-1))
    for part in ([*range(13)], [*range(13, 20)], [20], [21], [22], [23]):
        call = Cached(
            {"q": q[:, part], "k": k[:, part], "v": v[:, part], "k_cache": k_cache, "v_cache": v_cache,
             "cache_seqlens": lengths, "block_table": table, "rotary": rotary}, [], []
        )  # fmt: skip
        out, _, k_cache, v_cache = run(call, backend)
        outs.append(out)
        lengths = lengths + len(part)
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [True, False], ids=["neighbours", "halves"])
@pytest.mark.parametrize("pairs", [8, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_rotary(backend, pairs, interleaved, causal):
    """Turned as `onchip.nn.rotary` turns, features beyond the pairs left alone."""
    dtype = F32 if backend == "triton" else F64
    call = cached([0, 7, 31], 3, page_size=4, dtype=dtype, causal=causal)
    turns = RotaryTable(2 * pairs)(40, like=call["q"])
    settings = {"rotary": tuple(turns.unbind(-1)), "rotary_interleaved": interleaved}
    arguments, keys = call.arguments | settings, [x.clone() for x in call.keys]
    turned = call["q"].clone()
    for b, n in enumerate([0, 7, 31]):
        keys[b][n:] = _turned(keys[b][n:], turns[n : n + 3], interleaved)
        turned[b] = _turned(turned[b], turns[n : n + 3] if causal else turns[[n] * 3], interleaved)
    out, lse, k_cache, v_cache = run(Cached(arguments, [], []), backend)
    want = Cached(call.arguments | {"q": turned, "k_cache": k_cache, "v_cache": v_cache}, keys, call.values)
    tight = {"rtol": 1e-12, "atol": 1e-12} if dtype == F64 else {"rtol": 1e-5, "atol": 1e-5}
    for b, row in enumerate(want.cases()):
        exact = onchip.attention_with_lse(**row.arguments, backend="reference")
        torch.testing.assert_close((out[b : b + 1], lse[b : b + 1]), exact, **tight)
    pages = [[(int(call["block_table"][b, n // 4]), n % 4) for n in range(len(x))] for b, x in enumerate(keys)]
    for rows, places in zip(keys, pages, strict=True):
        torch.testing.assert_close(torch.stack([k_cache[place] for place in places]), rows, **tight)
    unturned = Cached(call.arguments, call.keys, call.values)
    check_cache(Cached(unturned.arguments | {"k_cache": v_cache}, call.values, call.values), v_cache, v_cache)


@pytest.mark.parametrize("page_size", [None, 4])
def test_positions_of_rows_that_have_lost_their_first_keys(backend, page_size):
    """The cache holds the last keys only, turned where they stood: a window sees no difference."""
    turns = tuple(RotaryTable(16)(60, like=torch.randn(1)).unbind(-1))
    whole = cached([40, 37], 2, page_size=page_size, window=(8, 0))
    whole.arguments.update({n: whole[n].nan_to_num() for n in ("k_cache", "v_cache")}, rotary=turns)
    want = run(whole, backend)[0]
    lost = torch.tensor([30, 21])
    part = cached([10, 16], 2, page_size=page_size, window=(8, 0))
    arguments = (
        part.arguments
        | {n: whole[n] for n in "qkv"}
        | {"rotary": turns, "rotary_seqlens": lost + part["cache_seqlens"]}
    )
    for b, n in enumerate([10, 16]):
        for i in range(n):
            for name in ("k_cache", "v_cache"):
                arguments[name][slot(part["block_table"], b, i, arguments[name].shape[1])] = whole[name][
                    slot(whole["block_table"], b, i + int(lost[b]), whole[name].shape[1])
                ]
    out, *_ = run(Cached(arguments, [], []), backend)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def _turned(x, turns, interleaved):
    n = 2 * turns.shape[-2]
    first = x[..., :n] if interleaved else torch.stack([x[..., : n // 2], x[..., n // 2 : n]], -1).flatten(-2)
    first = rotate(first[None], turns)[0]
    if not interleaved:
        first = torch.cat([first[..., ::2], first[..., 1::2]], -1)
    return torch.cat([first, x[..., n:]], -1)


@pytest.mark.skipif(_native.missing is not None, reason="the native kernels are not installed")
@pytest.mark.parametrize("tq", [1, 200])
def test_bits_depend_neither_on_pages_nor_on_the_batch_nor_on_threads(tq):
    call = cached([700, 3, 65], tq, page_size=16, heads=(8, 4), dims=(32, 32), rotary=(torch.rand(900, 8),) * 2)
    call = Cached(call.arguments | {n: call[n].nan_to_num() for n in ("k_cache", "v_cache")}, call.keys, call.values)
    want = run(call, "cpu")
    with threads(4):
        assert all(map(torch.equal, run(call, "cpu"), want))
    pages = call["block_table"].clamp(0, len(call["k_cache"]) - 1).long()
    contiguous = {n: call[n][pages].flatten(1, 2) for n in ("k_cache", "v_cache")} | {"block_table": None}
    assert all(map(torch.equal, run(Cached(call.arguments | contiguous, [], []), "cpu")[:2], want))
    for b in range(3):
        row = {n: call[n][b : b + 1] for n in ("q", "k", "v", "cache_seqlens", "block_table")}
        alone = run(Cached(call.arguments | row, [], []), "cpu")[:2]
        assert all(torch.equal(x, y[b : b + 1]) for x, y in zip(alone, want, strict=False))


@st.composite
def calls(draw: st.DrawFn) -> Cached:
    """Any call, of a size for milliseconds."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    size, length = draw(st.sampled_from([*PAGES, 2, 5, 64])), st.integers(0, draw(st.sampled_from([5, 40, 300])))
    lengths = draw(st.lists(length, max_size=4))
    tq, kv_heads = draw(st.sampled_from([1, 1, 2, 7, 20])), draw(st.integers(1, 2))
    heads = kv_heads * draw(st.sampled_from([1, 1, 2, 3])), kv_heads
    dims = draw(st.sampled_from([8, 16, 5, 64])), draw(st.sampled_from([8, 16, 5, 64]))
    side = st.one_of(st.none(), st.integers(0, 30))
    more = {
        "causal": draw(st.booleans()),
        "window": draw(st.one_of(st.none(), st.tuples(side, side))),
        "softcap": draw(st.sampled_from([0.0, 3.0])),
        "sinks": draw(st.sampled_from([None, torch.randn(heads[0])])),
        "starts": draw(st.sampled_from([None, [draw(st.integers(0, n)) for n in lengths]])),
        "dtype": draw(st.sampled_from([F32, BF16, F64])),
    }
    return cached(
        lengths, tq, added=draw(st.sampled_from([None, 0, 3])), page_size=size, heads=heads, dims=dims, **more
    )


@pytest.mark.skipif(_native.missing is not None, reason="the native kernels are not installed")
@settings(max_examples=60)
@given(calls())
def test_any_call_on_the_cpu(call):
    check(call, "cpu")
