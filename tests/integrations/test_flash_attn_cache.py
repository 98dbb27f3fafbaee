"""flash-attn's functions over a key–value cache, contiguous and paged, at a choice of its test suite's cases, on a CPU.

The rule: the largest error against plain attention in float32 is at most twice that of plain attention in the inputs'
dtype, plus 1e-5. What is flash-attn 3's alone is compared in float64.
"""

import functools
import itertools
import random

import pytest
import torch

import onchip
from onchip.integrations import flash_attn
from onchip.integrations.flash_attn import hopper

from ..ops.attention.tolerance import eager

LENGTHS = ((1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048), (128, 128), (1, 4096))


def drawn_cases(count):
    """Of each of flash-attn's parameters one value, at random, `count` times."""
    pick = random.Random(0)
    for _ in range(count):
        tq, capacity = pick.choice(LENGTHS)
        yield {
            "tq": tq,
            "capacity": capacity,
            "dim": pick.choice((32, 59, 64, 96, 128, 192)),
            "kv_heads": pick.choice((6, 3, 1)),
            "dtype": pick.choice((torch.bfloat16, torch.float16)),
            "added": pick.choice((None, tq, pick.randint(1, tq))),
            "mask": pick.choice(("full", "causal", "local")),
            "alibi": pick.random() < 0.3,
            "softcap": pick.choice((0.0, 0.0, 20.0)),
            "rotary": pick.choice((0.0, 0.5, 1.0)),
            "interleaved": pick.random() < 0.5,
            "page_size": pick.choice((None, None, 16, 256)),
            "batch_idx": pick.random() < 0.5,
            "leftpad": pick.random() < 0.3,
            "num_splits": pick.choice((0, 1, 4)),
        }


def turned(x, positions, cos, sin, interleaved):
    """`x (T, H, D)` turned as complex numbers, rounded once."""
    n = cos.shape[1]
    wide = x.to(torch.float64)[..., : 2 * n]
    pairs = wide.unflatten(-1, (n, 2)) if interleaved else wide.unflatten(-1, (2, n)).transpose(-1, -2)
    angle = torch.complex(cos.double(), sin.double())[positions][:, None]
    out = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * angle)
    out = (out if interleaved else out.transpose(-1, -2)).flatten(-2)
    return torch.cat([out, x.double()[..., 2 * n :]], -1).to(x.dtype)


def paged(cache, size):
    """The same rows in pages of random order, and the table that finds them."""
    rows, capacity = cache[0].shape[:2]
    per_row = -(-capacity // size)
    table = torch.randperm(rows * per_row + 3)[: rows * per_row].view(rows, per_row)
    pages = []
    for x in cache:
        padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, per_row * size - capacity))
        page = torch.full((rows * per_row + 3, size, *x.shape[2:]), torch.nan, dtype=x.dtype)
        page[table] = padded.unflatten(1, (per_row, size))
        pages.append(page)
    return pages, table.int()


@pytest.mark.parametrize("case", list(drawn_cases(40)), ids=lambda c: "-".join(f"{v}" for v in c.values()))
def test_by_the_rule(case):
    batch, heads, tq, dim, dtype = 2, 6, case["tq"], case["dim"], case["dtype"]
    rows = batch * 2 if case["batch_idx"] and case["page_size"] is None else batch
    q = torch.randn(batch, tq, heads, dim).to(dtype)
    cache = [torch.randn(rows, case["capacity"], case["kv_heads"], dim).to(dtype) for _ in "kv"]
    added = case["added"] or 0
    new = [torch.randn(batch, added, case["kv_heads"], dim).to(dtype) for _ in "kv"]
    lengths = torch.randint(0, case["capacity"] - added + 1, (batch,), dtype=torch.int32)
    starts = torch.stack([torch.randint(0, int(n) + 1, ()) for n in lengths]).int() if case["leftpad"] else None
    index = torch.randperm(rows, dtype=torch.int32)[:batch] if rows > batch else None
    left, right = (random.Random(1).randint(0, case["capacity"]), 5) if case["mask"] == "local" else (-1, -1)
    causal = case["mask"] == "causal"
    slopes = torch.rand(batch, heads) * 0.3 if case["alibi"] else None
    tables = None
    if added and case["rotary"]:
        angle = torch.rand(case["capacity"] + tq, int(case["rotary"] * dim) // 2 or 1) * 6.3
        tables = angle.cos().to(dtype), angle.sin().to(dtype)

    want_q, want_new, want = q.clone(), new[0].clone(), []
    plain = functools.partial(
        eager,
        causal=causal,
        window=tuple(None if side < 0 else side for side in (left, right)),
        softcap=case["softcap"],
    )
    for b in range(batch):
        n = int(lengths[b])
        if tables is not None:
            ordered = torch.arange(tq) if case["mask"] != "full" else torch.zeros(tq, dtype=torch.int64)
            want_q[b] = turned(q[b], n + ordered, *tables, case["interleaved"])
            want_new[b] = turned(new[0][b], n + torch.arange(added), *tables, case["interleaved"])
        row, first = (b if index is None else int(index[b])), 0 if starts is None else int(starts[b])
        keys = torch.cat([cache[0][row, first:n], want_new[b]])
        values = torch.cat([cache[1][row, first:n], new[1][b]])
        one = [x[None] for x in (want_q[b], keys, values)]
        mine = None if slopes is None else slopes[b : b + 1]
        want.append([plain(*(x.float() for x in one), alibi_slopes=mine), plain(*one, alibi_slopes=mine)])

    stored, table = (cache, None) if case["page_size"] is None else paged(cache, case["page_size"])
    stored = [x.clone() for x in stored]
    out, lse = flash_attn.flash_attn_with_kvcache(
        q,
        *stored,
        *(new if added else (None, None)),
        *(tables or (None, None)),
        lengths,
        index,
        starts,
        table,
        causal=causal,
        window_size=(left, right),
        softcap=case["softcap"],
        rotary_interleaved=case["interleaved"],
        alibi_slopes=slopes,
        num_splits=case["num_splits"],
        return_softmax_lse=True,
    )
    for b, ((exact, exact_lse), (low, _)) in enumerate(want):
        assert (out[b].float() - exact[0]).abs().max() <= 2 * (low[0].float() - exact[0]).abs().max() + 1e-5
        empty = exact_lse[0] == -torch.inf
        assert (lse[b][empty] == torch.inf).all()
        torch.testing.assert_close(lse[b][~empty], exact_lse[0][~empty], rtol=1e-5, atol=1e-4)
        for which, (before, rows_added) in enumerate(zip(cache, (want_new, new[1]), strict=True)):
            row, after = b if index is None else int(index[b]), stored[which]
            held = after[row] if table is None else after[table[b].long()].flatten(0, 1)[: case["capacity"]]
            expected = before[row].clone()
            expected[int(lengths[b]) : int(lengths[b]) + added] = rows_added[b]
            eps = torch.finfo(dtype).eps  # the turned keys are rounded from float32 here, from float64 there
            torch.testing.assert_close(held, expected, rtol=eps, atol=eps if added and tables else 0)


def test_flash_attention_3_takes_the_same_calls():
    q, k, v = (torch.randn(2, 3, h, 16) for h in (4, 2, 2))
    caches, angle = [torch.randn(2, 40, 2, 16) for _ in "kv"], torch.rand(50, 4)
    pages, table = paged(caches, 8)
    more = {"rotary_cos": angle.cos(), "rotary_sin": angle.sin(), "cache_seqlens": 30, "causal": True}
    second, third = ([x.clone() for x in pages] for _ in range(2))
    want = flash_attn.flash_attn_with_kvcache(q, *second, k, v, block_table=table, **more)
    assert torch.equal(hopper.flash_attn_with_kvcache(q, *third, k, v, page_table=table, **more), want)
    for a, b in zip(third, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    metadata = hopper.get_scheduler_metadata(2, 3, 40, 4, 2, 16, torch.tensor([30, 30]), causal=True)
    more = {"cache_seqlens": 30, "causal": True, "return_softmax_lse": True}
    out, lse, *parts = hopper.flash_attn_with_kvcache(q, *caches, scheduler_metadata=metadata, **more)
    want = onchip.attention_with_lse(q, *(x[:, :30] for x in caches), causal=True)
    torch.testing.assert_close((out, lse), want)
    assert [x.numel() for x in parts] == [0, 0]


def test_what_a_call_leaves_out():
    """No lengths: all there is room for. More rows in the cache than in the batch: the first ones."""
    q, caches = torch.randn(2, 1, 4, 16), [torch.randn(5, 12, 2, 16) for _ in "kv"]
    want = onchip.attention(q, *(x[:2] for x in caches))
    torch.testing.assert_close(flash_attn.flash_attn_with_kvcache(q, *caches), want)
    pages, table = paged([x[:2] for x in caches], 4)
    torch.testing.assert_close(flash_attn.flash_attn_with_kvcache(q, *pages, block_table=table), want)


def ragged(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (6, 2)}])
@pytest.mark.parametrize("packed", [(True, True), (True, False), (False, True), (False, False)])
def test_each_row_its_own_queries_keys_and_positions(packed, mask, page_size):
    f64, (nq, nk) = torch.float64, ([3, 1, 6], [2, 5, 0])
    nq, nk = nq if packed[0] else [4] * 3, nk if packed[1] else [4] * 3
    held, begins = torch.tensor([7, 0, 15], dtype=torch.int32), torch.tensor([9, 0, 3], dtype=torch.int32)
    q, qv = torch.randn(sum(nq), 4, 8, dtype=f64), torch.randn(sum(nq), 4, 6, dtype=f64)
    k, v = (torch.randn(sum(nk), 2, d, dtype=f64) for d in (8, 6))
    caches = [torch.randn(3, 20, 2, d, dtype=f64) for d in (8, 6)]
    angle = torch.rand(40, 3, dtype=f64)
    tables = angle.cos(), angle.sin()
    sides = tuple(None if side < 0 else side for side in mask.get("window_size", (-1, -1)))
    want, want_caches = [], [x.clone() for x in caches]
    rows = zip(
        *(x.split(n) for x, n in ((q, nq), (qv, nq), (k, nk), (v, nk))), held.tolist(), begins.tolist(), strict=True
    )
    for b, (q_b, qv_b, k_b, v_b, n, begin) in enumerate(rows):
        q_b = turned(q_b, begin + (torch.arange(len(q_b)) if mask else torch.zeros(len(q_b), dtype=int)), *tables, True)
        k_b = turned(k_b, begin + torch.arange(len(k_b)), *tables, True)
        for cache, x in zip(want_caches, (k_b, v_b), strict=True):
            cache[b, n : n + len(x)] = x
        keys, values = (x[b, : n + len(k_b)] for x in want_caches)
        side = torch.cat([q_b, qv_b], -1)[None], torch.cat([keys, values], -1)[None], values[None]
        out, lse = eager(*side, causal=mask.get("causal", False), window=sides)
        want.append((out[0], lse[0]))
    want_out, want_lse = torch.cat([out for out, _ in want]), torch.cat([lse for _, lse in want], 1)

    def shaped(x, is_packed):
        return x if is_packed else x.view(3, 4, *x.shape[1:])

    stored, table = (caches, None) if page_size is None else paged(caches, page_size)
    got, got_lse, *_ = hopper.flash_attn_with_kvcache(
        shaped(q, packed[0]),
        *stored,
        *(shaped(x, packed[1]) for x in (k, v)),
        shaped(qv, packed[0]),
        *tables,
        held,
        page_table=table,
        cu_seqlens_q=ragged(nq) if packed[0] else None,
        cu_seqlens_k_new=ragged(nk) if packed[1] else None,
        rotary_seqlens=begins,
        **mask,
        return_softmax_lse=True,
    )
    torch.testing.assert_close(got.reshape(want_out.shape), want_out, rtol=1e-10, atol=1e-10)
    got_lse = got_lse if packed[0] else got_lse.transpose(0, 1).flatten(1)
    torch.testing.assert_close(got_lse, want_lse, rtol=1e-10, atol=1e-10)
    for b, n, x in zip(range(3), (held + torch.tensor(nk)).tolist(), range(3), strict=True):
        for after, expected in zip(stored, want_caches, strict=True):
            row = after[b] if table is None else after[table[x].long()].flatten(0, 1)
            torch.testing.assert_close(row[:n], expected[b, :n], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("page_size", [16, 256])
@pytest.mark.parametrize(
    "features", [{}, {"causal": True}, {"window_size": (40, 17)}, {"causal": True, "softcap": 20.0}]
)
def test_packed_queries_over_pages(features, page_size):
    """flash_attn_varlen_func with a block table, as at (127, 512) of its suite."""
    nq, nk = [17, 127, 1, 40], [512, 300, 113, 40]
    slopes = torch.rand(6) * 0.3
    q, caches = torch.randn(sum(nq), 6, 64).bfloat16(), [torch.randn(4, 512, 2, 64).bfloat16() for _ in "kv"]
    pages, table = paged(caches, page_size)
    out, lse, dropped = flash_attn.flash_attn_varlen_func(
        q, *pages, ragged(nq), ragged(nk), 127, 512, alibi_slopes=slopes, block_table=table, return_attn_probs=True,
        **features,
    )  # fmt: skip
    assert lse.shape == (6, sum(nq)) and dropped.numel() == 0
    sides = tuple(None if side < 0 else side for side in features.get("window_size", (-1, -1)))
    more = {n: x for n, x in features.items() if n != "window_size"} | {"window": sides, "alibi_slopes": slopes}
    for b, (rows, got) in enumerate(zip(q.split(nq), out.split(nq), strict=True)):
        one = rows[None], *(x[b : b + 1, : nk[b]] for x in caches)
        exact, low = eager(*(x.float() for x in one), **more)[0], eager(*one, **more)[0]
        assert (got.float() - exact[0]).abs().max() <= 2 * (low.float() - exact).abs().max() + 1e-5


def test_only_the_used_rows_count():
    cu_q, cu_k, used_q, used_k = ragged([5, 4, 3]), ragged([6, 2, 9]), torch.tensor([3, 0, 3]), torch.tensor([6, 1, 4])
    q, k, v = (torch.randn(n, h, 8, dtype=torch.float64, requires_grad=True) for n, h in ((12, 4), (17, 2), (17, 2)))
    out, lse = hopper.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 5, 9, used_q, used_k, causal=True, return_attn_probs=True
    )
    want, want_lse = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for b in range(3):
        rows, keys = (slice(int(cu[b]), int(cu[b] + n[b])) for cu, n in ((cu_q, used_q), (cu_k, used_k)))
        part, part_lse = onchip.attention_with_lse(q[None, rows], k[None, keys], v[None, keys], causal=True)
        want[rows], want_lse[:, rows] = part[0], part_lse[0]
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    weights = torch.randn_like(out)
    for got, expected in zip(*(torch.autograd.grad(x, (q, k, v), weights) for x in (out, want)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine(dtype):
    parts, lses = torch.randn(5, 2, 7, 3, 16), torch.randn(5, 2, 7, 3)
    lses[2] = -torch.inf
    out, lse = hopper.flash_attn_combine(parts, lses, out_dtype=dtype)
    torch.testing.assert_close(lse, lses.logsumexp(0))
    want = (lses.softmax(0)[..., None] * parts).sum(0)
    torch.testing.assert_close(out, want.to(dtype))
    place = torch.empty_like(out)
    assert hopper.flash_attn_combine(parts, lses, place)[0] is place and torch.equal(place, out)


X, CACHE = torch.zeros(2, 1, 2, 8), torch.zeros(2, 4, 2, 8)
FA2, FA3 = flash_attn.flash_attn_with_kvcache, hopper.flash_attn_with_kvcache
CU = ragged([1, 1])
INTS = {"dtype": torch.int32}


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: FA2(X, CACHE[0], CACHE), ValueError, "k_cache must be a tensor of 4 dim"),
        (lambda: FA2(X, CACHE, CACHE, X, X), ValueError, "cache_seqlens must be given where k and v are"),
        (lambda: FA2(X, CACHE, CACHE, X, X, cache_seqlens=4), ValueError, "must be at most the cache's capacity 4"),
        (lambda: FA2(X, CACHE, CACHE, X, cache_seqlens=1), ValueError, "k and v must be given together"),
        (lambda: FA2(X, CACHE, CACHE, rotary_cos=X[0, 0]), ValueError, "got no rotary_sin"),
        (lambda: FA2(X, CACHE, CACHE, rotary_cos=X[0, 0], rotary_sin=X[0, 0]), ValueError, "k and v must be given wh"),
        (lambda: FA2(X, CACHE, CACHE, cache_batch_idx=torch.tensor([0, 2])), ValueError, "name rows from 0 to 1"),
        (lambda: FA2(X, CACHE, CACHE, cache_batch_idx=X), TypeError, "cache_batch_idx must be .* int32"),
        (lambda: FA2(X, CACHE, CACHE, cache_batch_idx=CU, block_table=CU), ValueError, "where block_table is given"),
        (lambda: FA3(X, CACHE, CACHE, cache_batch_idx=CU, page_table=CU), ValueError, "where page_table is given"),
        (
            lambda: FA2(X, CACHE, CACHE, block_table=torch.full((2, 1), 9, **INTS)),
            ValueError,
            "block_table must name pages from 0 to 1, got 9",
        ),
        (lambda: FA2(X.clone().requires_grad_(), CACHE, CACHE), RuntimeError, "gradient with respect to q"),
        (lambda: FA3(X, CACHE, CACHE, attention_chunk=2), NotImplementedError, "attention_chunk must be 0"),
        (lambda: FA3(X, CACHE, CACHE, k_descale=X), NotImplementedError, "k_descale must be None"),
        (lambda: FA3(X, CACHE, CACHE, rotary_seqlens=CU[1:]), ValueError, "given where rotary_seqlens is"),
        (lambda: FA3(X, CACHE, CACHE, cu_seqlens_k_new=CU), ValueError, "given where cu_seqlens_k_new is"),
        (lambda: FA3(X, CACHE, CACHE, qv=X[..., :3]), ValueError, r"qv must have shape \(2, 2, 8\)"),
        (lambda: FA3(X[:, 0], CACHE, CACHE, cu_seqlens_q=ragged([1, 2])), ValueError, "cu_seqlens_q must run from 0"),
        (
            lambda: FA3(X, CACHE, CACHE, X[:, 0], X[:, 0], cache_seqlens=4, cu_seqlens_k_new=CU),
            ValueError,
            "appended keys must be at most 4",
        ),
        (
            lambda: FA3(X, CACHE, CACHE, X[:, 0], X[:, 0], None, X[0, 0], X[0, 0], 1, cu_seqlens_k_new=CU),
            ValueError,
            "rotary's cos must have shape",
        ),
        (
            lambda: FA3(X, CACHE, CACHE, X, X, None, X[0, :, 0, :4], X[0, :, 0, :4], 1, rotary_seqlens=CU[1:]),
            ValueError,
            "tables must cover 2 positions for row 0, whose new keys begin at 1, got 1",
        ),
        (
            lambda: FA3(X, CACHE, CACHE, X, X, None, X[0, :, 0, :4], X[0, :, 0, :4], 1, rotary_seqlens=[0, 0]),
            TypeError,
            "rotary_seqlens must be a tensor of int32 or int64, got list",
        ),
        (
            lambda: FA3(X, CACHE, CACHE, X, X, None, X[0, :, 0, :4], X[0, :, 0, :4], 1, rotary_seqlens=torch.zeros(2)),
            TypeError,
            "rotary_seqlens must be a tensor of int32 or int64, got torch.float32",
        ),
        (
            lambda: flash_attn.flash_attn_varlen_func(
                X[:, 0], CACHE, CACHE, CU, None, 1, 1, block_table=torch.zeros(2, 1, **INTS)
            ),
            TypeError,
            "cu_seqlens_k must be an int32 or int64 tensor, got NoneType",
        ),
        (
            lambda: flash_attn.flash_attn_varlen_func(
                X[:, 0], CACHE, CACHE, CU, ragged([1]), 1, 1, block_table=torch.zeros(2, 1, **INTS)
            ),
            ValueError,
            "cu_seqlens_k must have cu_seqlens_q's length 3, got 2",
        ),
        (
            lambda: FA3(X.clone().requires_grad_(), CACHE, CACHE, X, X, X, cache_seqlens=1),
            RuntimeError,
            "q requires a gradient",
        ),
        (
            lambda: flash_attn.flash_attn_varlen_func(
                X[:, 0], CACHE, CACHE, CU, CU, 1, 1, 0.5, block_table=torch.zeros(2, 1, **INTS)
            ),
            NotImplementedError,
            "dropout_p must be 0 where block_table",
        ),
        (
            lambda: hopper.flash_attn_varlen_func(*[X[:, 0]] * 3, CU, CU, 1, 1, seqused_k=torch.tensor([1, 2])),
            ValueError,
            "seqused_k must be from 0 to the sequences' lengths",
        ),
        (
            lambda: hopper.flash_attn_combine(X[None], X[None, ..., 0], X.double(), torch.float32),
            ValueError,
            "out must have shape",
        ),
    ],
)
def test_what_does_not_fit_raises_and_writes_nothing(call, error, says):
    with pytest.raises(error, match=says):
        call()
    assert (CACHE == 0).all()
