"""What attention over a cache refuses, before anything is written, and what its sentences say."""

import pytest
import torch

import onchip

Q, K = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 8)
PAGES = torch.zeros(5, 4, 2, 8)
TABLE = torch.tensor([[3, 1, 0], [2, 4, 0]], dtype=torch.int32)
LENGTHS = torch.tensor([5, 2])
TABLES = torch.rand(20, 4), torch.rand(20, 4)


def paged(**changed):
    return {"q": Q, "k_cache": PAGES, "v_cache": PAGES, "cache_seqlens": LENGTHS, "block_table": TABLE} | changed


def appending(**changed):
    return paged(**({"k": K, "v": K} | changed))


def contiguous(**changed):
    cache = torch.zeros(2, 8, 2, 8)
    return {"q": Q, "k_cache": cache, "v_cache": cache, "cache_seqlens": LENGTHS} | changed


def table(*entries):
    """The table with other entries at (row, index)."""
    changed = TABLE.clone()
    for b, i, page in entries:
        changed[b, i] = page
    return changed


WRONG = {
    "not a tensor": (paged(q=[1.0]), TypeError, ["q must be a tensor", "list"]),
    "no cache": (paged(k_cache=None), TypeError, ["k_cache must be a tensor", "NoneType"]),
    "integers": (paged(q=Q.int()), TypeError, ["q must be float", "torch.int32"]),
    "another dtype": (paged(v_cache=PAGES.half()), TypeError, ["v_cache must have q's dtype", "float32", "float16"]),
    "another device": (appending(v=K.to("meta")), TypeError, ["v must have q's dtype and device", "cpu", "meta"]),
    "rank": (paged(q=Q[0]), ValueError, ["q must have 4 dimensions (batch, time", "(3, 4, 8)"]),
    "rank of pages": (paged(k_cache=PAGES[0]), ValueError, ["k_cache must have 4 dimensions (pages, page size"]),
    "head dims": (paged(k_cache=PAGES[..., :7]), ValueError, ["k_cache must have q's head dim 8", "(5, 4, 2, 7)"]),
    "caches": (paged(v_cache=PAGES[:4]), ValueError, ["v_cache must have k_cache's shape (5, 4, 2)", "(4, 4, 2, 8)"]),
    "heads": (paged(q=Q[:, :, :3]), ValueError, ["q's heads must be a multiple of k_cache's", "3 and 2"]),
    "no head dim": (paged(q=Q[..., :0], k_cache=PAGES[..., :0]), ValueError, ["head dims must be at least 1"]),
    "k alone": (paged(k=K), ValueError, ["k and v must be given together", "only k"]),
    "v alone": (paged(v=K), ValueError, ["k and v must be given together", "only v"]),
    "rows of k": (appending(q=Q[:1]), ValueError, ["k must have q's batch size", "(1, 3, 2, 8)", "(2, 3, 2, 8)"]),
    "heads of k": (paged(k=Q, v=K), ValueError, ["k must have", "k_cache's heads", "(2, 3, 2, 8)", "(2, 3, 4, 8)"]),
    "length of v": (paged(k=K, v=K[:, :2]), ValueError, ["v must have", "as many keys as k", "(2, 2, 2, 8)"]),
    "lengths not integers": (paged(cache_seqlens=LENGTHS.float()), TypeError, ["cache_seqlens must be a tensor"]),
    "lengths a number": (paged(cache_seqlens=5), TypeError, ["must be a tensor of int32 or int64", "int"]),
    "lengths elsewhere": (paged(cache_seqlens=LENGTHS.to("meta")), TypeError, ["cache_seqlens must be on q's device"]),
    "shape of lengths": (paged(cache_seqlens=LENGTHS[:1]), ValueError, ["cache_seqlens must have shape (2,)", "(1,)"]),
    "shape of pads": (paged(cache_leftpad=LENGTHS[:1]), ValueError, ["cache_leftpad must have shape (2,)", "(1,)"]),
    "table of int64": (paged(block_table=TABLE.long()), TypeError, ["block_table must be a tensor of int32", "int64"]),
    "shape of table": (paged(block_table=TABLE[:1]), ValueError, ["block_table must have shape (2, pages", "(1, 3)"]),
    "empty pages": (paged(k_cache=PAGES[:, :0], v_cache=PAGES[:, :0]), ValueError, ["pages of k_cache must hold"]),
    "batch of the cache": (contiguous(q=Q[:1], cache_seqlens=LENGTHS[:1]), ValueError, ["k_cache", "batch size 1"]),
    "a negative length": (paged(cache_seqlens=-LENGTHS), ValueError, ["must not be negative", "-5 for row 0"]),
    "beyond the capacity": (
        contiguous(cache_seqlens=torch.tensor([8, 9])), ValueError, ["plus the 0", "capacity 8", "got 9 for row 1"]
    ),
    "no room for new keys": (
        contiguous(cache_seqlens=torch.tensor([5, 6]), k=K, v=K), ValueError, ["plus the 3", "8, got 6 for row 1"]
    ),
    "a table too short": (
        appending(cache_seqlens=torch.tensor([5, 10])), ValueError, ["block_table's 3 pages of 4", "got 10 for row 1"]
    ),
    "a page beyond the cache": (
        paged(block_table=table((0, 1, 5))), ValueError, ["pages from 0 to 4", "got 5 for row 0 at index 1"]
    ),
    "a negative page": (
        paged(block_table=table((1, 0, -1))), ValueError, ["pages from 0 to 4", "got -1 for row 1 at index 0"]
    ),
    "a bad page for new keys": (
        appending(block_table=table((1, 1, 9))), ValueError, ["pages from 0 to 4", "got 9 for row 1 at index 1"]
    ),
    "a bad page after the pad": (
        paged(cache_leftpad=torch.tensor([4, 0]), block_table=table((0, 1, 5), (0, 0, 7))),
        ValueError, ["pages from 0 to 4", "got 5 for row 0 at index 1"],
    ),
    "pad beyond the length": (
        paged(cache_leftpad=torch.tensor([0, 3])), ValueError, ["cache_leftpad must be", "3 for row 1, which holds 2"]
    ),
    "a negative pad": (paged(cache_leftpad=torch.tensor([0, -3])), ValueError, ["between 0 and", "got -3 for row 1"]),
    "rotary without keys": (paged(rotary=TABLES), ValueError, ["k and v must be given where rotary is"]),
    "rotary not a pair": (appending(rotary=TABLES[0]), TypeError, ["rotary must be a pair", "Tensor"]),
    "rotary too wide": (
        appending(rotary=(torch.rand(20, 5),) * 2), ValueError, ["rotary's cos", "the head dim 8", "(20, 5)"]
    ),
    "rotary of nothing": (appending(rotary=(torch.rand(20, 0),) * 2), ValueError, ["0 < 2n", "(20, 0)"]),
    "rotary's shapes": (appending(rotary=(TABLES[0], TABLES[1][:9])), ValueError, ["rotary's sin", "(9, 4)"]),
    "rotary's dtype": (appending(rotary=(TABLES[0].int(), TABLES[1])), TypeError, ["cos must be float", "int32"]),
    "rotary's device": (appending(rotary=(TABLES[0], TABLES[1].to("meta"))), TypeError, ["rotary's sin must be on"]),
    "rotary too short": (
        appending(rotary=(TABLES[0][:7], TABLES[1][:7])), ValueError, ["cover 8 positions", "begin at 5, got 7"]
    ),
    "positions without rotary": (appending(rotary_seqlens=LENGTHS), ValueError, ["rotary must be given where rotary_"]),
    "shape of positions": (
        appending(rotary=TABLES, rotary_seqlens=LENGTHS[:1]), ValueError, ["rotary_seqlens must have shape (2,)"]
    ),
    "a position beyond rotary": (
        appending(rotary=TABLES, rotary_seqlens=torch.tensor([0, 18])), ValueError, ["cover 21 positions for row 1"]
    ),
    "a negative position": (
        appending(rotary=TABLES, rotary_seqlens=torch.tensor([0, -1])), ValueError, ["not be negative, got -1"]
    ),
    "interleaved": (appending(rotary=TABLES, rotary_interleaved=1), TypeError, ["rotary_interleaved must be", "1"]),
    "causal": (paged(causal="no"), TypeError, ["causal must be True or False", "'no'"]),
    "window": (paged(window=(-1, 0)), ValueError, ["window's left must be None", "-1"]),
    "softcap": (paged(softcap=-1.0), ValueError, ["softcap must be finite", "-1.0"]),
    "sinks": (paged(sinks=torch.randn(3)), ValueError, ["sinks must have shape (4,)", "(3,)"]),
    "backend": (paged(backend="cuda"), ValueError, ["backend must be None or one of", "'cuda'"]),
}  # fmt: skip


@pytest.mark.parametrize("arguments, error, parts", WRONG.values(), ids=WRONG)
def test_refused(arguments, error, parts):
    before = {n: arguments[n].clone() for n in ("k_cache", "v_cache") if arguments[n] is not None}
    with pytest.raises(error) as raised:
        onchip.attention_with_cache(**arguments)
    for part in parts:
        assert part in str(raised.value)
    assert all(torch.equal(arguments[n], x) for n, x in before.items())


def test_what_a_row_does_not_use_may_be_anything():
    odd = table((0, 2, -7), (1, 1, 99), (1, 2, 1 << 30))
    want = onchip.attention_with_cache(**paged())
    assert torch.equal(onchip.attention_with_cache(**paged(block_table=odd)), want)
    pads = {"cache_leftpad": torch.tensor([4, 0])}
    want = onchip.attention_with_cache(**paged(**pads))
    assert torch.equal(onchip.attention_with_cache(**paged(block_table=table((0, 0, -1)), **pads)), want)
