"""flash-attn's functions, held to flash-attn's own rule at its sizes, on a CPU.

The rule: the largest error against plain attention in float32 is at most twice that of plain attention in the inputs'
dtype; three times for the gradients. Its head dims, lengths, heads, masks and dtypes are here, each with some of the
others instead of all.
"""

import itertools
import math

import pytest
import torch

import onchip
from onchip.integrations import flash_attn
from onchip.integrations.flash_attn import bert_padding, hopper

from ..ops.attention.tolerance import eager

HEAD_DIMS = (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
LENGTHS = ((113, 203), (128, 217), (113, 211), (108, 256), (1, 239), (3, 799), (127, 512), (127, 513), (256, 128))
KV_HEADS = {"mha": 6, "gqa": 2, "mqa": 1}
FEATURES = (
    {},
    {"causal": True},
    {"window_size": (40, 17)},
    {"causal": True, "window_size": (64, -1)},
    {"alibi": True, "causal": True},
    {"softcap": 50.0},
    {"softcap": 3.0, "causal": True, "alibi": True},
)
CYCLE = [
    (dim, LENGTHS[i % len(LENGTHS)], heads, FEATURES[i % len(FEATURES)], (torch.bfloat16, torch.float16)[i % 2])
    for i, (dim, heads) in enumerate(itertools.product(HEAD_DIMS, KV_HEADS))
]


def plain(q, k, v, features, slopes=None):
    """Plain attention in q's dtype, with flash-attn's arguments."""
    sides = tuple(None if side < 0 else side for side in features.get("window_size", (-1, -1)))
    more = {name: features[name] for name in ("causal", "softcap") if name in features}
    return eager(q, k, v, window=sides, alibi_slopes=slopes, **more)


def drawn(*shape, dtype):
    return torch.randn(shape).to(dtype).requires_grad_()


def arguments(features, batch):
    """The arguments of a call, and the slopes."""
    slopes = torch.rand(batch, 6) * 0.3 if features.get("alibi") else None
    return {n: x for n, x in features.items() if n != "alibi"} | {"alibi_slopes": slopes}, slopes


def assert_by_the_rule(call, reference, leaves, gradient_factor=3):
    """flash-attn's rule for `call(*leaves)`, `reference` being plain attention on the same."""
    wide = [x.detach().float().requires_grad_() for x in leaves]
    out, exact, low = call(*leaves), reference(*wide), reference(*leaves)
    assert out.dtype == leaves[0].dtype
    weights = torch.randn_like(out)
    results = [
        (y, *torch.autograd.grad(y, x, weights.to(y.dtype))) for y, x in ((out, leaves), (exact, wide), (low, leaves))
    ]
    for which, (got, want, plainly) in enumerate(zip(*results, strict=True)):
        factor = gradient_factor if which else 2
        error, allowed = (x.float() - want for x in (got, plainly))
        assert error.abs().max() <= factor * allowed.abs().max(), f"result {which}"


@pytest.mark.parametrize("dim, lengths, heads, features, dtype", CYCLE)
def test_output_and_gradients(dim, lengths, heads, features, dtype):
    shapes = (1, lengths[0], 6, dim), (1, lengths[1], KV_HEADS[heads], dim), (1, lengths[1], KV_HEADS[heads], dim)
    more, slopes = arguments(features, 1)
    assert_by_the_rule(
        lambda q, k, v: flash_attn.flash_attn_func(q, k, v, **more),
        lambda q, k, v: plain(q, k, v, features, slopes)[0],
        [drawn(*shape, dtype=dtype) for shape in shapes],
    )


@pytest.mark.parametrize("lengths", [(1024, 1024), (1023, 1024), (1024, 1023)])
def test_long(lengths):
    assert_by_the_rule(
        lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=True),
        lambda q, k, v: plain(q, k, v, {"causal": True})[0],
        [drawn(1, t, 1, 32, dtype=torch.float16) for t in (lengths[0], lengths[1], lengths[1])],
    )


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("packed", [2, 3])
def test_packed_gradients_arrive_in_the_packed_tensor(packed, features):
    more, slopes = arguments(features, 2)
    if packed == 3:
        leaves = [drawn(2, 97, 3, 6, 64, dtype=torch.bfloat16)]
        call = lambda qkv: flash_attn.flash_attn_qkvpacked_func(qkv, **more)  # noqa: E731
        reference = lambda qkv: plain(*qkv.unbind(2), features, slopes)[0]  # noqa: E731
    else:
        leaves = [drawn(2, 63, 6, 64, dtype=torch.bfloat16), drawn(2, 97, 2, 2, 64, dtype=torch.bfloat16)]
        call = lambda q, kv: flash_attn.flash_attn_kvpacked_func(q, kv, **more)  # noqa: E731
        reference = lambda q, kv: plain(q, *kv.unbind(2), features, slopes)[0]  # noqa: E731
    assert_by_the_rule(call, reference, leaves, gradient_factor=2)


def ragged(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def one_by_one(features, slopes, cu_q, cu_k):
    """Plain attention of each of the packed sequences."""

    def reference(q, k, v):
        outs = []
        for b in range(len(cu_q) - 1):
            rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
            mine = None if slopes is None else slopes[b : b + 1]
            outs.append(plain(q[None, rows], k[None, keys], v[None, keys], features, mine)[0][0])
        return torch.cat(outs)

    return reference


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("heads", KV_HEADS)
def test_ragged(heads, features):
    more, slopes = arguments(features, 4)
    cu_q, cu_k, kv_heads = ragged([17, 1, 128, 40]), ragged([50, 64, 113, 40]), KV_HEADS[heads]
    rows, keys = int(cu_q[-1]), int(cu_k[-1])
    leaves = [
        drawn(rows, 6, 40, dtype=torch.bfloat16),
        *(drawn(keys, kv_heads, 40, dtype=torch.bfloat16) for _ in "kv"),
    ]
    reference = one_by_one(features, slopes, cu_q, cu_k)
    boundaries = cu_q, cu_k, 128, 113
    assert_by_the_rule(
        lambda q, k, v: flash_attn.flash_attn_varlen_func(q, k, v, *boundaries, **more), reference, leaves
    )
    q, k, v = leaves
    assert_by_the_rule(
        lambda q, kv: flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *boundaries, **more),
        lambda q, kv: reference(q, *kv.unbind(1)),
        [q, torch.stack([k, v], 1).detach().requires_grad_()],
    )


@pytest.mark.parametrize("features", FEATURES)
def test_ragged_qkvpacked(features):
    more, slopes = arguments(features, 3)
    cu = ragged([17, 1, 128])
    assert_by_the_rule(
        lambda qkv: flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, 128, **more),
        lambda qkv: one_by_one(features, slopes, cu, cu)(*qkv.unbind(1)),
        [drawn(146, 3, 6, 64, dtype=torch.float16)],
    )


def test_float32_and_bad_magnitudes():
    """What flash-attn tests as backward overflow: inputs of 5 and gradients of 3, where float16 comes near its end."""
    leaves = [(5 * torch.randn(1, 128, 2, 64)).half().requires_grad_() for _ in "qkv"]
    out = flash_attn.flash_attn_func(*leaves, causal=True)
    grads = torch.autograd.grad(out, leaves, 3 * torch.randn_like(out))
    assert all(x.isfinite().all() for x in (out, *grads))
    q, k, v = torch.randn(3, 1, 64, 2, 32)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, causal=True), onchip.attention(q, k, v, causal=True))


def test_returns():
    q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 3, 2, 16)
    out, lse, dropped = flash_attn.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    want, want_lse = onchip.attention_with_lse(q, k, k, causal=True)
    assert torch.equal(out, want)
    assert dropped.numel() == 0
    assert (lse[:, :, :2] == math.inf).all()  # the first two queries come before the first key
    assert (out[:, :2] == 0).all()
    assert torch.equal(lse[:, :, 2:], want_lse[:, :, 2:])
    out3, lse3 = hopper.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert torch.equal(out3, want)
    assert torch.equal(lse3, want_lse)
    assert (lse3[:, :, :2] == -math.inf).all()
    cu_q, cu_k = ragged([5, 5]), ragged([3, 3])
    flat = q.flatten(0, 1), k.flatten(0, 1), k.flatten(0, 1), cu_q, cu_k, 5, 3
    assert flash_attn.flash_attn_varlen_func(*flat, causal=True, return_attn_probs=True)[1].shape == (4, 10)
    assert hopper.flash_attn_varlen_func(*flat, causal=True, return_attn_probs=True)[1].shape == (4, 10)


def test_hopper_packs_query_and_key_heads():
    qkv = torch.randn(2, 9, 8, 16)
    q, k, v = qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:]
    assert torch.equal(hopper.flash_attn_qkvpacked_func(qkv, num_heads_q=4), onchip.attention(q, k, v))
    qkv = torch.randn(2, 9, 3, 4, 16)
    assert torch.equal(
        hopper.flash_attn_qkvpacked_func(qkv, causal=True), onchip.attention(*qkv.unbind(2), causal=True)
    )


@pytest.mark.parametrize("packed", [False, True])
def test_hopper_qv(packed):
    shapes = (2, 6, 4, 8), (2, 9, 2, 8), (2, 9, 2, 12), (2, 6, 4, 12)
    q, k, v, qv = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    wide_k, wide_v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    logits = torch.einsum("bihd,bjhd->bhij", q, wide_k) + torch.einsum("bihd,bjhd->bhij", qv, wide_v)
    hidden = torch.ones(6, 9, dtype=torch.bool).triu(9 - 6 + 1)
    p = (logits / 20**0.5).masked_fill(hidden, -math.inf).softmax(-1)
    want = torch.einsum("bhij,bjhd->bihd", p, wide_v)
    if packed:
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        got = hopper.flash_attn_varlen_func(
            *flat, ragged([6, 6]), ragged([9, 9]), 6, 9, causal=True, qv=qv.flatten(0, 1)
        ).view_as(want)
    else:
        got = hopper.flash_attn_func(q, k, v, causal=True, qv=qv)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v, qv), weights) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("packed", [False, True])
def test_hopper_eight_bits(packed):
    q, k, v = (torch.randn(2, t, h, 16).to(torch.float8_e4m3fn) for t, h in ((5, 4), (7, 2), (7, 2)))
    factors = {name: torch.rand(2, 2) + 0.5 for name in ("q_descale", "k_descale", "v_descale")}
    per_head = [factors["q_descale"].repeat_interleave(2, 1), factors["k_descale"], factors["v_descale"]]
    want = onchip.attention(*(x.float() * f[:, None, :, None] for x, f in zip((q, k, v), per_head, strict=True)))
    if packed:
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        got = hopper.flash_attn_varlen_func(*flat, ragged([5, 5]), ragged([7, 7]), 5, 7, **factors).view_as(want)
    else:
        got = hopper.flash_attn_func(q, k, v, **factors)
    assert torch.equal(got, want.to(torch.bfloat16))


def test_padding_and_back():
    x = torch.randn(3, 5, 2, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]])
    rows, indices, starts, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(rows, x[mask.bool()])
    assert (starts.tolist(), starts.dtype, longest, used.tolist()) == ([0, 3, 8, 10], torch.int32, 5, [3, 5, 2])
    assert torch.equal(bert_padding.pad_input(rows, indices, 3, 5), x * mask[:, :, None, None])
    assert torch.autograd.gradcheck(
        lambda x: bert_padding.pad_input(bert_padding.unpad_input(x, mask)[0], indices, 3, 5), x
    )
    unused = torch.tensor([[0, 0, 0, 0, 1], [0] * 5, [0] * 5])
    rows, _, starts, _, used = bert_padding.unpad_input(x, mask.bool(), unused.bool())
    assert (starts.tolist(), used.tolist(), rows.shape[0]) == ([0, 4, 9, 11], [3, 5, 2], 11)


def test_compiles_whole():
    q, k, v = torch.randn(3, 1, 9, 2, 16)
    call = torch.compile(flash_attn.flash_attn_func, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        call(q, k, v, causal=True, window_size=(4, -1)), onchip.attention(q, k, v, causal=True, window=(4, None))
    )


X, CU = torch.zeros(1, 3, 2, 8), torch.tensor([0, 3])
FLAT = (X[0], X[0], X[0], CU, CU, 3, 3)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: flash_attn.flash_attn_func(X, X, X, 1.0), ValueError, "dropout_p must be .* below 1, got 1.0"),
        (lambda: flash_attn.flash_attn_varlen_func(*FLAT, -0.1), ValueError, "dropout_p must be .* below 1, got -0.1"),
        (lambda: flash_attn.flash_attn_func(X, X, X, window_size=3), ValueError, "window_size must be a pair"),
        (lambda: flash_attn.flash_attn_func(X, X, X, window_size=(None, 1)), ValueError, "window_size must be a pair"),
        (lambda: flash_attn.flash_attn_func(X[0], X, X), ValueError, "q must have 4 dimensions"),
        (lambda: flash_attn.flash_attn_qkvpacked_func(X), ValueError, r"qkv must have shape \(batch, time, 3, heads"),
        (lambda: flash_attn.flash_attn_kvpacked_func(X, X), ValueError, r"kv must have shape \(batch, time, 2, heads"),
        (
            lambda: flash_attn.flash_attn_varlen_qkvpacked_func(X[:, :2], CU, 3),
            ValueError,
            r"shape \(total, 3, heads, dim\)",
        ),
        (lambda: hopper.flash_attn_func(X, X, X, attention_chunk=2), NotImplementedError, "attention_chunk must be 0"),
        (lambda: hopper.flash_attn_func(X, X, X, qv=X[:, :2]), ValueError, r"qv must have shape \(1, 3, 2, 8\)"),
        (lambda: hopper.flash_attn_func(X, X, X, q_descale=X), TypeError, "q_descale.*float8_e4m3fn"),
        (
            lambda: hopper.flash_attn_func(*[X.to(torch.float8_e4m3fn)] * 3, k_descale=X),
            ValueError,
            r"k_descale.*\(1, 2\)",
        ),
        (lambda: hopper.flash_attn_func(X.to(torch.float8_e4m3fn), X, X), TypeError, "k must be float8_e4m3fn"),
        (lambda: hopper.flash_attn_func(X, X, X, qv=X.double()), TypeError, "qv must have q's dtype torch.float32"),
        (
            lambda: hopper.flash_attn_func(*(torch.zeros(1, 3, h, 8).to(torch.float8_e4m3fn) for h in (3, 2, 2))),
            ValueError,
            "q must have a multiple of k's 2 heads, got 3",
        ),
        (
            lambda: hopper.flash_attn_varlen_func(*[X[0].to(torch.float8_e4m3fn)] * 3, CU - 1, CU, 3, 3),
            ValueError,
            "cu_seqlens_q must run from 0 to the number of rows",
        ),
        (lambda: hopper.flash_attn_qkvpacked_func(X, num_heads_q=1), ValueError, "num_heads_q=1"),
    ],
)
def test_what_cannot_be_served_raises(call, error, says):
    with pytest.raises(error, match=says):
        call()
