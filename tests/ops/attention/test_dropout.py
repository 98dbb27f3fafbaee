"""Dropout: the same entries dropped by every implementation, as often as asked, independently, and in the gradients."""

import itertools
from math import sqrt

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import onchip
from onchip.ops import _triton
from onchip.ops.attention import reference

from .support import Case, randn_case, run, threads
from .tolerance import assert_exact, assert_same, assert_twice_eager

F32, F64 = torch.float32, torch.float64
ON_GPU = torch.cuda.is_available()
NO_TRITON = _triton.limits(torch.device("cuda" if ON_GPU else "cpu"))
if NO_TRITON is None and not ON_GPU and not _triton.interpreted_on():
    NO_TRITON = "there is no GPU, and TRITON_INTERPRET=1 is not set"

on_triton = pytest.mark.skipif(NO_TRITON is not None, reason=NO_TRITON or "")
EVERYWHERE = ["reference", pytest.param("triton", marks=on_triton)]
WORD = 2**32
SEEDS = (0, 1, 20_000_000_011, 2**63 - 1)

# (counter, key, words): Random123's known answers for philox4x32 with 10 rounds.
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD - 1,) * 4, (WORD - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_philox_gives_the_published_words(counter, key, words):
    got = reference.philox(tuple(map(torch.tensor, counter)), key[0] + WORD * key[1])
    assert tuple(map(int, got)) == words


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mask_is_what_the_docstring_says(seed):
    kept = reference.Dropout(0.4, seed).kept((2, 3, 5, 9))
    for b, h, i, j in itertools.product(*map(range, kept.shape)):
        words = reference.philox(tuple(map(torch.tensor, (j // 4, i, h, b))), seed)
        assert kept[b, h, i, j] == (int(words[j % 4]) >= int(0.4 * WORD))


def mask(backend: str, shape: tuple[int, int, int, int], kv_heads: int, **more) -> torch.Tensor:
    """(B, H, Tq, Tk): which probabilities are kept, read off outputs for values that tell the keys apart."""
    batch, heads, tq, tk = shape
    width, device = 64, "cuda" if backend == "triton" and ON_GPU else "cpu"
    q, k = torch.zeros(batch, tq, heads, 16, device=device), torch.zeros(batch, tk, kv_heads, 16, device=device)
    parts = []
    for first in range(0, tk, width):
        v = torch.eye(tk, device=device)[:, first : first + width]
        v = torch.nn.functional.pad(v, (0, width - v.shape[1]))[None, :, None].expand(batch, tk, kv_heads, width)
        parts.append(onchip.attention(q, k, v, backend=backend, **more))
    return (torch.cat(parts, -1)[..., :tk].transpose(1, 2) > 0).cpu()


MASKS = {
    "many rows": ((2, 4, 70, 150), 2),
    "one tile and a little": ((1, 1, 49, 129), 1),
    "decoding": ((2, 4, 1, 600), 1),
    "two queries": ((1, 2, 2, 530), 2),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape, kv_heads", MASKS.values(), ids=MASKS)
def test_the_native_kernels_drop_what_the_reference_drops(backend, shape, kv_heads, seed):
    kept = reference.Dropout(0.3, seed).kept(shape)
    assert torch.equal(mask(backend, shape, kv_heads, dropout_p=0.3, seed=seed), kept)


@pytest.mark.parametrize("seed", SEEDS[-2:])
@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("shape, kv_heads", [((2, 4, 20, 70), 2), ((1, 2, 1, 600), 1)], ids=["forward", "decoding"])
def test_so_do_the_others(name, shape, kv_heads, seed):
    kept = reference.Dropout(0.3, seed).kept(shape)
    assert torch.equal(mask(name, shape, kv_heads, dropout_p=0.3, seed=seed), kept)


@pytest.mark.parametrize("dropout_p", [1e-12, 1 - 1e-12])
def test_the_ends_of_the_range(backend, dropout_p):
    kept = mask(backend, (1, 2, 40, 40), 1, dropout_p=dropout_p, seed=5)
    assert kept.all() if dropout_p < 0.5 else not kept.any()


@pytest.mark.parametrize("dropout_p", [0.003, 0.1, 0.5, 0.97])
def test_as_many_are_kept_as_asked(dropout_p):
    kept = reference.Dropout(dropout_p, 11).kept((3, 4, 128, 513)).double()
    deviation = sqrt(dropout_p * (1 - dropout_p))
    for dims in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        rates = kept.mean(dims)
        scores = (rates - (1 - dropout_p)) / (deviation / sqrt(kept.numel() / rates.numel()))
        assert scores.abs().max() < 5  # one in two million is further out
    flat = kept.flatten(0, 2).sum(1)
    chi_square = ((flat - 513 * (1 - dropout_p)) / (deviation * sqrt(513))).square().sum()
    assert abs(chi_square - flat.numel()) < 6 * sqrt(2 * flat.numel())


def test_entries_are_independent_of_their_neighbours():
    kept = reference.Dropout(0.5, 12).kept((4, 4, 64, 256)).double() * 2 - 1
    other = reference.Dropout(0.5, 13).kept((4, 4, 64, 256)).double() * 2 - 1
    products = [kept * other]
    for dim, shift in ((0, 1), (1, 1), (2, 1), (2, 8), (3, 1), (3, 2), (3, 4), (3, 16)):
        n = kept.shape[dim] - shift
        products.append(kept.narrow(dim, 0, n) * kept.narrow(dim, shift, n))
    for product in products:
        assert abs(product.mean()) < 5 / sqrt(product.numel())


def test_the_mean_over_seeds_is_attention_without_dropout():
    call = randn_case(1, 3, 9, 2)
    want = run(call, "reference")["out"]
    outs = [onchip.attention(**call.arguments, dropout_p=0.3, seed=seed) for seed in range(2000)]
    error = torch.stack(outs).std(0) / sqrt(len(outs))
    assert ((torch.stack(outs).mean(0) - want).abs() < 5 * error).all()


FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (40, 7)},
    "softcap": {"softcap": 2.0, "causal": True},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1])},
    "sinks": {"sinks": torch.tensor([1.0, -2.0]), "window": (64, 0)},
    "bias": {"bias": torch.randn(2, 1, 1), "sinks": torch.tensor([1.0, -2.0])},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("tq, tk", [(1, 1), (63, 63), (100, 203), (203, 113), (1, 300)])
def test_at_twice_eagers_error(backend, tq, tk, feature):
    more = {"dropout_p": 0.2, "seed": 9} | FEATURES[feature]
    assert_twice_eager(randn_case(1, tq, tk, 2, kv_heads=1, dim=32, dtype=F32, **more), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tq, tk", [(100, 203), (2, 300)])
def test_in_16_bits_at_twice_eagers_error(backend, tq, tk, dtype):
    more = {"dropout_p": 0.2, "seed": 9, "causal": True}
    assert_twice_eager(randn_case(1, tq, tk, 2, kv_heads=1, dim=32, **more).to(dtype), backend)


@on_triton
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("dtype", [F32, torch.float16], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_triton_at_twice_eagers_error(feature, dtype):
    more = {"dropout_p": 0.2, "seed": 9} | FEATURES[feature]
    assert_twice_eager(randn_case(2, 33, 70, 2, kv_heads=1, dim=24, **more).to(dtype), "triton")


@on_triton
@pytest.mark.parametrize("tq, tk", [(40, 70), (1, 600)], ids=["forward", "decoding"])
def test_triton_with_a_dense_bias_and_decoding(tq, tk):
    more = {"bias": torch.randn(4, tq, tk), "dropout_p": 0.5, "seed": 2**40}
    assert_twice_eager(randn_case(2, tq, tk, 4, kv_heads=2, dim=16, dtype=F32, **more), "triton")


def packed_and_apart(dtype: torch.dtype) -> tuple[Case, list[Case]]:
    """A packed call, and its sequences as the ones of a batch of their own, each at its own place in it."""
    lengths, heads = (5, 0, 70, 33), 2
    cu = torch.tensor([0, *lengths]).cumsum(0)
    together = randn_case(int(cu[-1]), int(cu[-1]), heads, dim=16, dtype=dtype, cu_seqlens_q=cu, dropout_p=0.3, seed=21)
    apart = []
    for b, (start, stop) in enumerate(itertools.pairwise(cu.tolist())):
        batch = {n: together[n][None, start:stop].expand(b + 1, -1, -1, -1) for n in "qkv"}
        out = together.grad_out[None, start:stop].expand(b + 1, -1, -1, -1)
        lse = together.grad_lse[None, :, start:stop].expand(b + 1, -1, -1)
        apart.append(Case(batch | {"dropout_p": 0.3, "seed": 21}, out, lse))
    return together, apart


def assert_packed_is_one_by_one(name: str, dtype: torch.dtype, same) -> None:
    together, apart = packed_and_apart(dtype)
    got = run(together, name)
    cu = together["cu_seqlens_q"].tolist()
    for call, (start, stop) in zip(apart, itertools.pairwise(cu), strict=True):
        want = run(call, name)
        same({n: got[n][start:stop] for n in ("out", "q", "k", "v")}, {n: want[n][-1] for n in ("out", "q", "k", "v")})


def test_packed_is_one_by_one(backend):
    assert_packed_is_one_by_one(backend, F64, assert_exact)


def test_packed_is_one_by_one_in_the_reference():
    assert_packed_is_one_by_one("reference", F64, assert_exact)


@on_triton
def test_packed_is_one_by_one_in_triton():
    close = lambda got, want: [torch.testing.assert_close(got[n], want[n]) for n in want]  # noqa: E731
    assert_packed_is_one_by_one("triton", F32, close)


def test_threads_change_no_bit(backend):
    call = randn_case(2, 200, 300, 4, kv_heads=2, dim=32, dtype=F32, dropout_p=0.1, seed=4, bias=torch.randn(200, 300))
    want = run(call, backend)
    for n in (1, 2, 3):
        with threads(n):
            assert_same(run(call, backend), want)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_seeds_decide(name):
    q = torch.randn(1, 20, 2, 8)
    drop = lambda **more: onchip.attention(q, q, q, backend=name, **more)  # noqa: E731
    assert torch.equal(drop(dropout_p=0.5, seed=7), drop(dropout_p=0.5, seed=7))
    assert not torch.equal(drop(dropout_p=0.5, seed=7), drop(dropout_p=0.5, seed=7 + WORD))
    assert not torch.equal(drop(dropout_p=0.5, seed=7), drop(dropout_p=0.5, seed=8))
    torch.manual_seed(3)
    first, second = drop(dropout_p=0.5), drop(dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(drop(dropout_p=0.5), first) and not torch.equal(first, second)


def test_without_dropout_nothing_is_drawn(backend):
    q, state = torch.randn(1, 20, 2, 8), torch.get_rng_state()
    want = onchip.attention(q, q, q, backend=backend)
    assert torch.equal(onchip.attention(q, q, q, dropout_p=0.0, seed=5, backend=backend), want)
    assert torch.equal(torch.get_rng_state(), state)


def test_lse_is_of_all_logits(backend):
    q = torch.randn(1, 70, 2, 8)
    (_, plain), (_, dropped) = (onchip.attention_with_lse(q, q, q, dropout_p=p, backend=backend) for p in (0.0, 0.9))
    assert torch.equal(plain, dropped)


def test_checkpointing_draws_the_same_seed(backend):
    q = torch.randn(1, 30, 2, 8, dtype=F64, requires_grad=True)

    def loss(q):
        return onchip.attention(q, q, q, dropout_p=0.5, backend=backend).square().sum()

    torch.manual_seed(0)
    (want,) = torch.autograd.grad(loss(q), q)
    torch.manual_seed(0)
    (got,) = torch.autograd.grad(checkpoint(loss, q, use_reentrant=False), q)
    assert torch.equal(got, want)


def test_compiled_with_a_seed_that_changes(implementation):
    compiled = torch.compile(onchip.attention, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.reset()
    q = torch.randn(1, 20, 2, 8, requires_grad=True)
    for n, seed in enumerate((3, 12, 2**40, 2**63 - 1)):
        with torch._dynamo.config.patch(error_on_recompile=n > 1):
            out = compiled(q, q, q, dropout_p=0.5, seed=seed)
        want = onchip.attention(q, q, q, dropout_p=0.5, seed=seed, backend=implementation)
        assert torch.equal(out, want)
        assert torch.equal(*(torch.autograd.grad(x.square().sum(), q)[0] for x in (out, want)))


def test_compiled_in_pieces_without_a_seed(implementation):
    compiled = torch.compile(lambda q: onchip.attention(q * 2, q, q, dropout_p=0.5) + 1, backend="aot_eager")
    torch._dynamo.reset()
    q = torch.randn(1, 20, 2, 8)
    torch.manual_seed(5)
    out = compiled(q)
    torch.manual_seed(5)
    assert torch.equal(out, onchip.attention(q * 2, q, q, dropout_p=0.5, backend=implementation) + 1)


def test_exported_with_a_seed(implementation):
    class Module(torch.nn.Module):
        def forward(self, q):
            return onchip.attention(q, q, q, dropout_p=0.5, seed=17)

    q = torch.randn(1, 20, 2, 8)
    want = onchip.attention(q, q, q, dropout_p=0.5, seed=17, backend=implementation)
    assert torch.equal(torch.export.export(Module(), (q,)).module()(q), want)
