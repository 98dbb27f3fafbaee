"""Merged parts are the whole: in value, in every gradient, and in the uses that parts are made for."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import onchip

F64 = torch.float64


def parts_of(q, k, v, cuts, **more):
    """Attention over the keys between the cuts, one part after the other; the sink counts in the first."""
    sinks, bounds = more.pop("sinks", None), [0, *cuts, k.shape[1]]
    for a, b in itertools.pairwise(bounds):
        yield onchip.attention_with_lse(q, k[:, a:b], v[:, a:b], sinks=sinks if a == 0 else None, **more)


def merged(*arguments, **more):
    return onchip.merge_attention(*zip(*parts_of(*arguments, **more), strict=True))


def tensors(batch, tq, tk, heads, kv_heads, dim=8, value_dim=6, dtype=F64):
    shapes = (batch, tq, heads, dim), (batch, tk, kv_heads, dim), (batch, tk, kv_heads, value_dim)
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


@given(st.data())
def test_random_splits_make_the_whole(data):
    tq, tk = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20))
    cuts = sorted(data.draw(st.lists(st.integers(1, tk), max_size=4)))
    heads, kv_heads = data.draw(st.sampled_from([(2, 2), (4, 2), (3, 1)]))
    leaves = tensors(2, tq, tk, heads, kv_heads)
    if data.draw(st.booleans()):
        sinks = torch.randn(heads, dtype=F64, requires_grad=True)
        leaves, more = (*leaves, sinks), {"sinks": sinks}
    else:
        more = {}
    whole, got = onchip.attention_with_lse(*leaves[:3], **more), merged(*leaves[:3], cuts, **more)
    weights = [torch.randn_like(x) for x in whole]
    grads = (torch.autograd.grad(outputs, leaves, weights) for outputs in (whole, got))
    want, got = [*whole, *next(grads)], [*got, *next(grads)]
    for name, x, y in zip(("out", "lse", "q", "k", "v", "sinks"), got, want, strict=False):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_merged_in_float32(dtype):
    q, k, v = tensors(2, 7, 40, 4, 2, dtype=dtype)
    outs, lses = zip(*parts_of(q, k, v, [3, 25]), strict=True)
    out, lse = onchip.merge_attention(outs, lses)
    exact, exact_lse = onchip.merge_attention([x.double() for x in outs], [x.double() for x in lses])
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    # Some ten operations in float32, and one rounding of the result.
    slack = torch.finfo(dtype).eps / 2 * exact.abs() + 10 * torch.finfo(torch.float32).eps * max(
        x.abs().max() for x in outs
    )
    assert ((out - exact).abs() <= slack).all()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


def test_packed():
    q, k, v = (torch.randn(11, 2, 8, dtype=F64) for _ in range(3))
    whole = onchip.attention_with_lse(q, k, v, cu_seqlens_q=torch.tensor([0, 4, 11]))
    parts = []
    for rows, starts in (([0, 1, 4, 5, 6], [0, 2, 5]), ([2, 3, 7, 8, 9, 10], [0, 2, 6])):
        cu = {"cu_seqlens_q": torch.tensor([0, 4, 11]), "cu_seqlens_k": torch.tensor(starts)}
        parts.append(onchip.attention_with_lse(q, k[rows], v[rows], **cu))
    for got, want in zip(onchip.merge_attention(*zip(*parts, strict=True)), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_stacked_is_the_same_as_a_sequence():
    outs, lses = torch.randn(3, 2, 5, 4, 8), torch.randn(3, 2, 4, 5)
    for got, want in zip(onchip.merge_attention(outs, lses), onchip.merge_attention([*outs], [*lses]), strict=True):
        assert torch.equal(got, want)


def test_what_saw_nothing_counts_for_nothing():
    out, lse = torch.randn(1, 3, 2, 4, dtype=F64), torch.randn(1, 2, 3, dtype=F64)
    nothing, never = torch.full_like(out, torch.nan), torch.full_like(lse, -math.inf)
    got, got_lse = onchip.merge_attention([nothing, out, nothing], [never, lse, never])
    assert torch.equal(got, out)
    assert torch.equal(got_lse, lse)
    got, got_lse = onchip.merge_attention([nothing, nothing], [never, never])
    assert torch.equal(got, torch.zeros_like(out))
    assert torch.equal(got_lse, never)


def test_large_log_sum_exps_do_not_overflow():
    out, lse = onchip.merge_attention(
        torch.tensor([1.0, 3.0])[:, None, None, None, None], torch.full((2, 1, 1, 1), 1e4)
    )
    assert out.item() == 2
    assert lse.item() == pytest.approx(1e4 + math.log(2))


def partly_empty():
    outs, lses = torch.randn(2, 1, 3, 2, 2, dtype=F64), torch.randn(2, 1, 2, 3, dtype=F64)
    empty = torch.zeros(lses.shape, dtype=torch.bool)
    empty[0, :, :, 0] = True  # seen by the second part only
    empty[:, :, :, 1] = True  # by none
    return outs.requires_grad_(), lses.requires_grad_(), empty


def test_derivatives_with_rows_that_saw_nothing():
    outs, lses, empty = partly_empty()

    def merge(outs, lses):
        out, lse = onchip.merge_attention(outs, lses.masked_fill(empty, -math.inf))
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert gradcheck(merge, (outs, lses))
    assert gradgradcheck(merge, (outs, lses))


def test_gradients_are_zero_and_not_nan_where_nothing_was_seen():
    outs, lses, empty = partly_empty()
    lses = lses.detach().masked_fill(empty, -math.inf).requires_grad_()
    out, lse = onchip.merge_attention(outs, lses)
    grads = torch.autograd.grad(
        (out, lse), (outs, lses), (torch.randn_like(out), torch.randn_like(lse)), create_graph=True
    )
    assert (grads[1][empty] == 0).all()
    again = torch.autograd.grad([g.square().sum() for g in grads], (outs, lses))
    assert all(x.isfinite().all() for x in (*grads, *again))


def test_derivatives_through_attention():
    q, k, v = tensors(1, 3, 5, 2, 1, dim=3, value_dim=2)
    sinks = torch.randn(2, dtype=F64, requires_grad=True)

    def whole(backend):
        return lambda q, k, v, sinks: merged(q, k, v, [2, 4], sinks=sinks, backend=backend)

    assert gradcheck(whole(None), (q, k, v, sinks))
    assert gradgradcheck(whole("reference"), (q, k, v, sinks))


def test_compiles_whole():
    q, k, v = tensors(1, 4, 9, 2, 1, dtype=torch.float32)
    call = torch.compile(lambda q, k, v: merged(q, k, v, [4]), backend="aot_eager", fullgraph=True)
    results = []
    for f in (call, lambda q, k, v: merged(q, k, v, [4])):
        out, lse = f(q, k, v)
        results.append((out, lse, *torch.autograd.grad(out.sum() + lse.square().sum(), (q, k, v))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_shared_prefix_decoding():
    """Cascade: one prompt's keys serve all sequences, whose queries become the rows of one call."""
    batch, prefix, own, heads, kv_heads, dim = 5, 40, 7, 4, 2, 8
    q = torch.randn(batch, 1, heads, dim, dtype=F64)
    shared, k, v = (torch.randn(n, t, kv_heads, dim, dtype=F64) for n, t in ((2, prefix), (batch, own), (batch, own)))

    one = onchip.attention_with_lse(q.transpose(0, 1), *shared.unsqueeze(1))
    prompt = one[0].transpose(0, 1), one[1].permute(2, 1, 0)
    out, lse = onchip.merge_attention(*zip(prompt, onchip.attention_with_lse(q, k, v, causal=True), strict=True))

    plain = [torch.cat([x.expand(batch, -1, -1, -1), y], 1) for x, y in zip(shared[:, None], (k, v), strict=True)]
    want, want_lse = onchip.attention_with_lse(q, *plain, causal=True)
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, want_lse, rtol=1e-10, atol=1e-10)


def test_tree_of_drafts():
    """Speculative decoding: each drafted token sees the context, its ancestors and itself."""
    parents, context, heads, dim = [-1, 0, 0, 1, 1, 2], 30, 2, 8
    n = len(parents)
    ancestry = torch.eye(n, dtype=torch.bool)
    for token, parent in enumerate(parents):
        if parent >= 0:
            ancestry[token] |= ancestry[parent]
    q, k, v = (torch.randn(1, t, heads, dim, dtype=F64) for t in (n, context + n, context + n))

    past = onchip.attention_with_lse(q, k[:, :context], v[:, :context])
    drafts = onchip.attention_with_lse(q, k[:, context:], v[:, context:], bias=ancestry)
    out, _ = onchip.merge_attention(*zip(past, drafts, strict=True))

    mask = torch.cat([torch.ones(n, context, dtype=torch.bool), ancestry], 1)
    torch.testing.assert_close(out, onchip.attention(q, k, v, bias=mask), rtol=1e-10, atol=1e-10)
    for token, parent in enumerate(parents):  # and each path of the tree is a plain sequence
        path = [token]
        while parent >= 0:
            path, parent = [parent, *path], parents[parent]
        rows = [*range(context), *(context + t for t in path)]
        alone = onchip.attention(q[:, path], k[:, rows], v[:, rows], causal=True)
        torch.testing.assert_close(out[:, token], alone[:, -1], rtol=1e-10, atol=1e-10)


OUT, LSE = torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    "outs, lses, error, says",
    [
        ([], [], ValueError, "at least one, got 0 and 0"),
        ([OUT], [LSE, LSE], ValueError, "one entry per part, at least one, got 1 and 2"),
        ([OUT, OUT[:, :2]], [LSE, LSE], ValueError, r"outs\[1\] must have shape \(1, 3, 2, 4\)"),
        ([OUT], [LSE.transpose(1, 2)], ValueError, r"lses\[0\] must have shape \(1, 2, 3\).* got \(1, 3, 2\)"),
        ([OUT[0, 0]], [LSE[0, 0]], ValueError, "outs must have 4 dimensions"),
        ([OUT, OUT.half()], [LSE, LSE], TypeError, r"outs\[1\] must be floating, of one dtype"),
        ([OUT], [LSE.long()], TypeError, r"lses\[0\] must be floating"),
        ([OUT], [LSE.to("meta")], TypeError, r"lses\[0\] must be .* on cpu"),
        ([None], [LSE], TypeError, r"outs\[0\] must be a tensor, got NoneType"),
        (3, [LSE], TypeError, "outs must be a sequence of tensors"),
        (torch.zeros(()), [LSE], ValueError, "outs must be a sequence .* got a scalar"),
    ],
)
def test_bad_input(outs, lses, error, says):
    with pytest.raises(error, match=says):
        onchip.merge_attention(outs, lses)
