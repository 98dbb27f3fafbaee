"""Block masks: the patterns by brute force, and attention under them against dense masks, on every implementation."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import onchip
from onchip import BlockMask
from onchip.ops.attention import block_patterns

from . import cases
from .support import Case, differentiate, randn_case, run, threads
from .test_dropout import EVERYWHERE, on_triton
from .tolerance import assert_exact, assert_same, assert_twice_eager

F32, F64 = torch.float32, torch.float64
SIZES = [(1, 1), (32, 32), (100, 100), (70, 203), (203, 70), (0, 5), (5, 0)]


def brute_force(tq: int, tk: int, sees: Any) -> Tensor:
    """(Tq, Tk), entry by entry."""
    entries = [sees(i, j) for i, j in product(range(tq), range(tk))]
    return torch.tensor(entries, dtype=torch.bool).view(tq, tk)


def near(back: int, window: tuple[int | None, int | None]) -> bool:
    left, right = window
    return (left is None or back <= left) and (right is None or back >= -right)


@pytest.mark.parametrize("tq, tk", SIZES)
@pytest.mark.parametrize("window", [(0, 0), (40, 3), (None, 0), (0, None), (1000, 1000), (64, 31)], ids=str)
@pytest.mark.parametrize("n_global", [0, 1, 40, 1000])
def test_local(tq, tk, window, n_global):
    mask = BlockMask.local(tq, tk, window=window, n_global=n_global, block=32)
    ahead = tk - tq
    want = brute_force(
        tq, tk, lambda i, j: near(i + ahead - j, window) or j < n_global or 0 <= i + ahead < n_global
    )  # fmt: skip
    assert torch.equal(mask.to_dense()[0, 0], want)


@pytest.mark.parametrize("tq, tk", SIZES)
@pytest.mark.parametrize("stride", [1, 3, 32, 50])
@pytest.mark.parametrize("window", [(None, None), (60, 0)], ids=str)
def test_dilated(tq, tk, stride, window):
    mask = BlockMask.dilated(tq, tk, stride=stride, window=window, block=32)
    ahead = tk - tq
    want = brute_force(tq, tk, lambda i, j: near(i + ahead - j, window) and (i + ahead - j) % stride == 0)
    assert torch.equal(mask.to_dense()[0, 0], want)


@pytest.mark.parametrize("max_stride", [None, 1, 4])
@pytest.mark.parametrize("length", [0, 1, 32, 200, 256])
def test_butterfly(length, max_stride):
    mask = BlockMask.butterfly(length, max_stride=max_stride, block=32)
    strides = [s for s in (0, 1, 2, 4, 8, 16) if max_stride is None or s <= max_stride]
    want = brute_force(length, length, lambda i, j: (i // 32) ^ (j // 32) in strides)
    assert torch.equal(mask.to_dense()[0, 0], want)
    assert mask.bits.numel() == 0


DOCUMENTS = [
    ([100], None),
    ([3, 0, 70, 1, 32, 96], None),
    ([0, 5, 40], [64, 0, 7]),
    ([64, 64], [32, 0]),
    ([], None),
    ([0], None),
]


@pytest.mark.parametrize("lengths, lengths_k", DOCUMENTS)
def test_documents(lengths, lengths_k):
    mask = BlockMask.documents(lengths, lengths_k, block=32)
    of_q, of_k = ([n for n, length in enumerate(x) for _ in range(length)] for x in (lengths, lengths_k or lengths))
    want = brute_force(len(of_q), len(of_k), lambda i, j: of_q[i] == of_k[j])
    assert torch.equal(mask.to_dense()[0, 0], want)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    assert torch.equal(BlockMask.documents(starts.diff(), lengths_k, block=32).to_dense(), mask.to_dense())


def tiled(*shape: int, block: int) -> Tensor:
    """(…, Tq, Tk): tiles that are empty, full, one of two random ones, or random."""
    *own, tq, tk = shape
    rows, columns = -(-tq // block), -(-tk // block)
    few, kinds = torch.rand(2, block, block) < 0.5, torch.randint(5, (*own, rows, columns))
    tiles = torch.rand(*own, rows, columns, block, block) < 0.5
    constant = torch.stack((torch.zeros_like(few[0]), torch.ones_like(few[0]), *few))
    tiles = torch.where(kinds[..., None, None] < 4, constant[kinds.clamp(max=3)], tiles)
    return tiles.transpose(-2, -3).reshape(*own, rows * block, columns * block)[..., :tq, :tk]


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("own", [(), (1, 1), (2, 1), (1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("tq, tk", SIZES)
def test_from_dense_and_back(tq, tk, own, block):
    dense = tiled(*own, tq, tk, block=block)
    own = own or (1, 1)
    mask = BlockMask.from_dense(dense, block=block)
    assert torch.equal(mask.to_dense(), dense.view(*own, tq, tk))
    assert mask.shape == (tq, tk) and (mask.batch, mask.heads, mask.block) == (*own, block)
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in mask.tensors)


def test_lists_by_key_are_the_transpose():
    mask = BlockMask.from_dense(tiled(2, 3, 200, 170, block=32), block=32)
    transposed = BlockMask.from_dense(mask.to_dense().transpose(2, 3), block=32)
    for lists, others in ((mask.by_key, transposed.by_query), (mask.by_query, transposed.by_key)):
        assert torch.equal(lists.starts, others.starts)
        assert torch.equal(lists.entries[:, 0], others.entries[:, 0])
        assert torch.equal(lists.entries[:, 1] < 0, others.entries[:, 1] < 0)


def test_equal_tiles_are_kept_once():
    mask = BlockMask.local(4096, 4096, window=(100, 0))
    assert mask.bits.shape[0] == 2
    assert BlockMask.from_dense(mask.to_dense()[0, 0]).bits.shape[0] <= 4  # the last ones' ends besides


def test_a_long_mask_is_small():
    n = 1 << 20
    for mask in (
        BlockMask.local(n, n, window=(1000, 0), n_global=1),
        BlockMask.butterfly(n),
        BlockMask.documents([700] * (n // 700)),
    ):
        assert sum(x.nbytes for x in mask.tensors) < 64 * n


@pytest.mark.parametrize("n_global", [0, 1])
def test_queries_before_the_first_key_cost_nothing(n_global):
    layout = block_patterns.local(2048, 64, (10, 0), n_global, 32)
    assert len(layout.tiles) <= 4 + n_global * (2048 // 32 + 2)


def test_density_counts_tiles():
    dense = torch.zeros(96, 64, dtype=torch.bool)
    dense[0, 0] = dense[64:, 32:] = True
    assert BlockMask.from_dense(dense, block=32).density == 2 / 6
    assert repr(BlockMask.from_dense(dense, block=32)) == "BlockMask(96×64, block 32, density 0.33)"
    assert "of 2 sequences and 3 heads" in repr(BlockMask.from_dense(dense.expand(2, 3, 96, 64), block=32))


@pytest.mark.parametrize("own", [((1, 1), (1, 1)), ((2, 1), (1, 3)), ((2, 3), (1, 1))], ids=str)
def test_and(own):
    first, second = (tiled(*x, 200, 170, block=32) for x in own)
    both = BlockMask.from_dense(first, block=32) & BlockMask.from_dense(second, block=32)
    assert torch.equal(both.to_dense(), first & second)


def test_predicate_of_sequences_and_heads():
    table = torch.randint(3, (2, 150))
    mask = BlockMask.from_predicate(
        lambda b, h, i, j: (table[b, i] == table[b, j]) & (i - j >= h), 150, 150, batch=2, heads=3, block=32
    )
    back = torch.arange(150)[:, None] - torch.arange(150)
    want = (table[:, None, :, None] == table[:, None, None]) & (back >= torch.arange(3)[:, None, None])
    assert torch.equal(mask.to_dense(), want)


@st.composite
def masked(draw: st.DrawFn, calls: Any, blocks: tuple[int, ...] = (32, 64, 128)) -> Case:
    """A call, with a random block mask of its own or of one for all."""
    call = draw(calls)
    if call["cu_seqlens_q"] is None:
        batch, (tq, tk) = call["q"].shape[0], (call[name].shape[1] for name in "qk")
    else:
        starts = [call["cu_seqlens_q"], call["cu_seqlens_q" if call["cu_seqlens_k"] is None else "cu_seqlens_k"]]
        batch, (tq, tk) = len(starts[0]) - 1, (int(x.diff().amax()) if len(x) > 1 else 0 for x in starts)
    own = draw(st.sampled_from([1, max(batch, 1)])), draw(st.sampled_from([1, call["q"].shape[-2]]))
    block = draw(st.sampled_from(blocks))
    mask = BlockMask.from_dense(tiled(*own, tq, tk, block=block), block=block)
    return replace(call, arguments=call.arguments | {"block_mask": mask})


@given(call=masked(cases.calls(F64)))
@settings(max_examples=25)
def test_the_reference_reads_it_as_a_dense_mask(call):
    visible, bias = call["block_mask"].to_dense(), call["bias"]
    if bias is None or bias.dtype == torch.bool:
        bias = visible if bias is None else visible & bias
        dense = replace(call, arguments=call.arguments | {"block_mask": None, "bias": bias})
        assert_same(run(call, "reference"), run(dense, "reference"))


@given(call=masked(cases.calls(F64)))
@settings(max_examples=60)
def test_any_call_in_float64(backend, call):
    assert_exact(run(call, backend), run(call, "reference"))


@given(call=masked(cases.packed(F64)))
@settings(max_examples=30)
def test_any_packed_call(backend, call):
    assert_exact(run(call, backend), run(call, "reference"))


@given(call=masked(cases.decodes(F64)))
@settings(max_examples=25)
def test_any_decode(backend, call):
    assert_exact(run(call, backend), run(call, "reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_errors_are_at_most_twice_eagers(backend, dtype, block, causal):
    mask = BlockMask.from_dense(tiled(1, 4, 300, 400, block=block), block=block)
    call = randn_case(1, 300, 400, 4, kv_heads=2, dim=64, dtype=F32, causal=causal, block_mask=mask)
    assert_twice_eager(call.to(dtype), backend)


TRITON = pytest.param("triton", marks=on_triton)


@pytest.mark.parametrize("more", [{}, {"causal": True}, {"window": (30, 9), "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("own, block", [((1, 1), 64), ((2, 2), 32)], ids=str)
@pytest.mark.parametrize("name", [TRITON])
def test_in_triton(name, own, block, more):
    mask = BlockMask.from_dense(tiled(*own, 70, 130, block=block), block=block)
    assert_twice_eager(randn_case(own[0], 70, 130, 2, kv_heads=1, dim=16, dtype=F32, block_mask=mask, **more), name)


@pytest.mark.parametrize("name", [TRITON])
@given(data=st.data())
@settings(max_examples=3)
def test_any_call_in_triton(name, data):
    assert_twice_eager(data.draw(masked(cases.short_calls(F32), (32,))), name)


EXTRA = {
    "bias": lambda: {"bias": torch.randn(2, 40, 100), "dropout_p": 0.3, "seed": 5},
    "bias of heads": lambda: {"bias": torch.randn(2, 1, 1), "sinks": torch.randn(2)},
    "bias of keys": lambda: {"bias": torch.randn(100), "alibi_slopes": torch.rand(2), "window": (60, None)},
}


@pytest.mark.parametrize("make", EXTRA.values(), ids=EXTRA)
@pytest.mark.parametrize("name", [TRITON])
def test_gradients_of_everything_in_triton(name, make):
    mask = BlockMask.from_dense(tiled(1, 2, 40, 100, block=32), block=32)
    assert_twice_eager(randn_case(1, 40, 100, 2, kv_heads=1, dim=16, dtype=F32, block_mask=mask, **make()), name)


@pytest.mark.parametrize("name", [TRITON])
def test_decoding_in_triton(name):
    mask = BlockMask.from_dense(tiled(1, 2, 3, 1100, block=32), block=32)
    assert_twice_eager(randn_case(1, 3, 1100, 2, kv_heads=1, dim=16, dtype=F32, block_mask=mask), name)


@pytest.mark.parametrize("name", [TRITON])
def test_packed_in_triton(name):
    mask = BlockMask.from_dense(tiled(3, 2, 70, 70, block=32), block=32)
    starts = torch.tensor([0, 33, 33, 103])
    call = randn_case(
        103, 103, 2, kv_heads=1, dim=16, dtype=F32, cu_seqlens_q=starts, block_mask=mask, bias=torch.randn(2, 70, 70)
    )
    exact = run(call.to(F64), "reference")
    for result, x in run(call, name).items():
        torch.testing.assert_close(x.double(), exact[result], rtol=1e-4, atol=1e-5)


def banded(tq: int, tk: int, hidden: slice) -> Tensor:
    """A dense mask in which some queries see nothing, and the last keys are seen by none."""
    dense = tiled(tq, tk, block=32) | torch.eye(tq, tk, dtype=torch.bool)
    dense[hidden], dense[:, tk - 64 :] = False, False
    return dense


@pytest.mark.parametrize("name", ["cpu", *EVERYWHERE])
@pytest.mark.parametrize("hidden", [slice(32, 64), slice(40, 43)], ids=["a tile", "some rows"])
def test_a_row_that_sees_nothing(name, hidden):
    call = randn_case(
        1, 70, 150, 2, dim=16, dtype=F32, block_mask=BlockMask.from_dense(banded(70, 150, hidden), block=32)
    )
    results = run(call, name)
    assert (results["lse"][0, :, hidden] == -torch.inf).all()
    for result in ("out", "q"):
        assert (results[result][0, hidden] == 0).all()
    for result in ("k", "v"):
        assert (results[result][0, 86:] == 0).all() and results[result][0, :70].any()
    assert not any(x.isnan().any() for x in results.values())


@pytest.mark.parametrize("name", ["cpu", TRITON])
def test_nothing_is_read_of_tiles_that_nobody_sees(name):
    call = randn_case(1, 70, 192, 2, dim=16, dtype=F32, bias=torch.randn(70, 192))
    call.arguments["block_mask"] = BlockMask.from_dense(banded(70, 192, slice(32, 64)), block=32)
    want = run(call, name)
    for tensor in ("k", "v"):
        call[tensor][:, 128:] = torch.nan
    assert_same(run(call, name), want)


def test_the_same_bits_whatever_the_threads(backend):
    mask = BlockMask.from_dense(tiled(1, 4, 700, 600, block=64), block=64)
    call = randn_case(2, 700, 600, 4, kv_heads=2, dim=16, dtype=F32, block_mask=mask, bias=torch.randn(4, 1, 600))
    with threads(1):
        want = run(call, backend)
    for n in (2, 3):
        with threads(n):
            assert_same(run(call, backend), want)


def test_under_a_full_mask_the_same_bits(backend):
    call = randn_case(1, 300, 520, 2, dim=32, dtype=F32, causal=True)
    mask = BlockMask.from_dense(torch.ones(300, 520, dtype=torch.bool))
    got, want = run(replace(call, arguments=call.arguments | {"block_mask": mask}), backend), run(call, backend)
    assert_same(got, want)


def test_gradcheck(implementation):
    mask = BlockMask.from_dense(tiled(1, 2, 40, 70, block=32), block=32)
    call = randn_case(1, 40, 70, 2, dim=2, sinks=torch.randn(2, dtype=F64), bias=torch.randn(40, 1, dtype=F64))
    leaves = [call[name].requires_grad_() for name in ("q", "k", "v", "sinks", "bias")]

    def function(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = onchip.attention_with_lse(
            q, k, v, sinks=sinks, bias=bias, block_mask=mask, causal=True, backend=implementation
        )
        return out, lse

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


CALLS = {
    "plain": lambda: randn_case(
        2, 50, 70, 4, kv_heads=2, dtype=F32, block_mask=BlockMask.from_dense(tiled(2, 4, 50, 70, block=32), block=32)
    ),
    "causal, sinks": lambda: randn_case(
        1, 70, 70, 2, dtype=F32, block_mask=BlockMask.butterfly(70, block=32), causal=True, sinks=torch.randn(2)
    ),
    "packed": lambda: randn_case(
        90, 90, 2, dtype=F32, cu_seqlens_q=torch.tensor([0, 20, 90]), block_mask=BlockMask.butterfly(70, block=32)
    ),
}


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
def test_compiled_is_the_same(implementation, make):
    call = make()
    compiled = torch.compile(onchip.attention_with_lse, fullgraph=True, backend="aot_eager")
    want = run(call, implementation)
    torch._dynamo.reset()
    assert_same(differentiate(call, compiled), want)


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
@pytest.mark.usefixtures("implementation")
def test_opcheck(make):
    call = make()
    right = 0 if call["causal"] else -1
    arguments = [*(call[n] for n in "qkv"), -1, right, 0.4, 0.0, None, None, call["sinks"], *[call["cu_seqlens_q"]] * 2]
    arguments += [0.0, 0, None, call["block_mask"].tensors, call["block_mask"].shape]
    out, lse = torch.ops.onchip.attention(*arguments)
    backward = (call.grad_out, call.grad_lse, out, lse, *arguments)
    torch.library.opcheck(torch.ops.onchip.attention_backward.default, backward)
    for x in arguments[:3]:
        x.requires_grad_()
    torch.library.opcheck(torch.ops.onchip.attention.default, tuple(arguments))


def test_fake_and_meta_tensors(implementation):
    call = CALLS["plain"]()
    real = run(call, implementation)
    mode = FakeTensorMode()
    mask = call["block_mask"]
    fakes = {n: mode.from_tensor(x) if isinstance(x, Tensor) else x for n, x in call.arguments.items()}
    fakes["block_mask"] = BlockMask.of_tensors([mode.from_tensor(x) for x in mask.tensors], mask.shape)
    metas = {n: x if x is None else x.to("meta") for n, x in call.arguments.items()}
    with mode:
        fake = run(Case(fakes, mode.from_tensor(call.grad_out), mode.from_tensor(call.grad_lse)), implementation)
    meta = run(Case(metas, call.grad_out.to("meta"), call.grad_lse.to("meta")), implementation)
    for name, x in real.items():
        assert fake[name].shape == meta[name].shape == x.shape, name


def test_torch_func(implementation):
    call = CALLS["causal, sinks"]()
    arguments = {name: x for name, x in call.arguments.items() if name != "q"}
    loss = lambda q: (onchip.attention(q, **arguments, backend=implementation) * call.grad_out).sum()  # noqa: E731
    q = call["q"].clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(q), q)
    assert torch.equal(torch.func.grad(loss)(call["q"]), want)


def test_explain(implementation):
    call = CALLS["plain"]()
    assert onchip.explain(onchip.attention, **call.arguments).chosen == implementation


Q, K = torch.randn(2, 40, 4, 8), torch.randn(2, 50, 2, 8)
FULL = torch.ones(40, 50, dtype=torch.bool)
WRONG = {
    "not a mask": (lambda: FULL, TypeError, ["block_mask must be a BlockMask", "Tensor"]),
    "lengths": (lambda: BlockMask.from_dense(FULL.T), ValueError, ["of shape (40, 50)", "BlockMask(50×40"]),
    "device": (lambda: BlockMask.from_dense(FULL).to("meta"), TypeError, ["on q's device cpu", "meta"]),
    "heads": (lambda: BlockMask.from_dense(FULL.expand(1, 2, 40, 50)), ValueError, ["1 or 4 heads", "2 heads"]),
    "batch": (lambda: BlockMask.from_dense(FULL.expand(3, 1, 40, 50)), ValueError, ["1 or 2 sequences", "3 sequences"]),
}


@pytest.mark.parametrize("make, exception, words", WRONG.values(), ids=WRONG)
def test_a_mask_that_does_not_fit(make, exception, words):
    with pytest.raises(exception) as raised:
        onchip.attention(Q, K, K, block_mask=make())
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize("name", ["cpu", *EVERYWHERE])
def test_a_packed_calls_mask_is_of_the_longest_lengths(name):
    x, starts = torch.randn(90, 2, 16), torch.tensor([0, 20, 90])
    with pytest.raises(ValueError, match=r"block_mask must be of the longest lengths \(70, 70\), got \(90, 90\)"):
        onchip.attention(x, x, x, cu_seqlens_q=starts, block_mask=BlockMask.butterfly(90), backend=name)


REFUSED = {
    "block": (lambda: BlockMask.butterfly(9, block=48), ValueError, "block must be a power of two of at least 32.*48"),
    "small block": (lambda: BlockMask.butterfly(9, block=16), ValueError, "block must be a power of two.*16"),
    "length": (lambda: BlockMask.butterfly(-1), ValueError, "tq must be at least 0, got -1"),
    "fraction": (lambda: BlockMask.local(9.0, 9, window=(1, 1)), TypeError, "tq must be an integer, got float"),
    "stride": (lambda: BlockMask.dilated(9, 9, stride=0), ValueError, "stride must be at least 1, got 0"),
    "max_stride": (lambda: BlockMask.butterfly(9, max_stride=0), ValueError, "max_stride must be at least 1, got 0"),
    "window": (lambda: BlockMask.local(9, 9, window=3), ValueError, r"window must be a pair \(left, right\).*3"),
    "window's side": (lambda: BlockMask.local(9, 9, window=(3, -1)), ValueError, "window's right must be at least 0"),
    "documents": (lambda: BlockMask.documents([3, -1]), ValueError, "each of lengths must be at least 0, got -1"),
    "more documents": (lambda: BlockMask.documents([3], [3, 4]), ValueError, "lengths_k must have lengths' 1 doc.*2"),
    "dtype": (lambda: BlockMask.from_dense(torch.ones(3, 3)), TypeError, "mask must be a boolean tensor.*float32"),
    "rank": (lambda: BlockMask.from_dense(FULL[None]), ValueError, r"mask must have shape.*\(1, 40, 50\)"),
    "predicate's dtype": (
        lambda: BlockMask.from_predicate(lambda b, h, i, j: i - j, 3, 3),
        TypeError,
        "visible must return a boolean tensor, got torch.int64",
    ),
    "predicate's shape": (
        lambda: BlockMask.from_predicate(lambda b, h, i, j: torch.ones(3, dtype=torch.bool), 3, 3),
        ValueError,
        r"visible must return a shape that broadcasts to \(1, 128, 128\), got \(3,\)",
    ),
    "and": (
        lambda: BlockMask.butterfly(64) & BlockMask.butterfly(64, block=32),
        ValueError,
        "same shape, block, device.*block 128.*block 32",
    ),
}


@pytest.mark.parametrize("make, exception, match", REFUSED.values(), ids=REFUSED)
def test_what_constructors_refuse(make, exception, match):
    with pytest.raises(exception, match=match):
        make()
