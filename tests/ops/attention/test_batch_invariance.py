"""Under `batch_invariant` a row has the same bits in a prefill, a chunk and a step, alone and among others."""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import onchip
from onchip.ops import _native, _triton

from .support import threads

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
NATIVE = () if _native.missing else tuple(f"cpu-{name}" for name in _native.kernels.instruction_sets())
TRITON = ("triton",) if _triton.limits(torch.device(DEVICE)) is None and (ON_GPU or _triton.interpreted_on()) else ()

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # NumPy's, where NaN is wanted
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # in the interpreter of Triton 3.6
]


@pytest.fixture(params=(*NATIVE, *TRITON))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An implementation, with working memory that is NaN; interpreted with smaller splits."""
    name, _, instruction_set = request.param.partition("-")
    if not instruction_set:
        if not ON_GPU:
            monkeypatch.setattr(import_module("onchip.ops.attention.triton.launches"), "SPLIT_SIZE", 64)
        yield name
        return
    before = _native.kernels.instruction_set()
    _native.kernels.use_instruction_set(instruction_set)
    _native.kernels.poison_scratch(True)
    yield name
    _native.kernels.poison_scratch(False)
    _native.kernels.use_instruction_set(before)


class Sequence:
    """q, k and v of one sequence `(1, T, heads, dim)`, and the settings of its calls."""

    def __init__(self, backend: str, dtype: torch.dtype, dim: int = 16, kv_heads: int = 2, **settings: Any) -> None:
        interpreted = backend == "triton" and not ON_GPU
        # NumPy's product gives a row other bits in another place, but here all its products and sums are exact.
        self._random = _few_values if interpreted else torch.randn
        self.length = 150 if interpreted else 1100 if ON_GPU else 300
        self.dtype, self.heads, self.dim = dtype, (2, kv_heads), dim
        self.device = "cuda" if backend == "triton" and ON_GPU else "cpu"
        self.settings = {"scale": 0.05, "batch_invariant": True, "backend": backend} | settings
        self.settings |= {n: x.to(self.device) for n, x in settings.items() if isinstance(x, Tensor)}
        self.q, self.k, self.v = self.random(1, self.length)

    def random(self, batch: int, length: int) -> list[Tensor]:
        """Other sequences like it."""
        heads = (self.heads[0], self.heads[1], self.heads[1])
        return [self._random(batch, length, n, self.dim).to(self.device, self.dtype) for n in heads]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        """out and lse of every row: (B, T, H, Dv + 1)."""
        out, lse = onchip.attention_with_lse(q, k, v, **({"causal": True} | self.settings | more))
        return torch.cat([out.to(lse.dtype), lse.transpose(-1, -2)[..., None]], -1)

    def attend_cached(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, **more: Any) -> Tensor:
        """The same over a cache."""
        out, lse = onchip.attention_with_cache_and_lse(q, k_cache, v_cache, **(self.settings | more))
        return torch.cat([out.to(lse.dtype), lse.transpose(1, 2)[..., None]], -1)


def _few_values(*shape: int) -> Tensor:
    return torch.randint(-1, 2, shape)


Rows = Iterator[tuple[int, int, Tensor]]  # rows from, to, and their results


def steps(s: Sequence) -> Rows:
    for n in (1, 2, s.length // 2, s.length):
        yield n - 1, n, s.attend(s.q[:, n - 1 : n], s.k[:, :n], s.v[:, :n])[0]


def chunks(s: Sequence) -> Rows:
    for begin, end in ((0, 7), (7, 8), (8, 90), (90, s.length)):
        yield begin, end, s.attend(s.q[:, begin:end], s.k[:, :end], s.v[:, :end])[0]


def in_a_batch(s: Sequence) -> Rows:
    others = s.random(5, s.length)
    for x, own in zip(others, (s.q, s.k, s.v), strict=True):
        x[3] = own[0]
    yield 0, s.length, s.attend(*others)[3]
    q, k, v = others
    yield s.length - 1, s.length, s.attend(q[:, -1:], k, v)[3]


def packed(s: Sequence) -> Rows:
    lengths = (20, s.length, 3)
    before, after = s.random(1, lengths[0]), s.random(1, lengths[2])
    q, k, v = (torch.cat(x, 1)[0] for x in zip(before, (s.q, s.k, s.v), after, strict=True))
    cu = torch.tensor([0, *lengths], device=s.device).cumsum(0)
    begin, end = cu[1:3].tolist()
    yield 0, s.length, s.attend(q, k, v, cu_seqlens_q=cu)[begin:end]
    last = torch.tensor([0, 1, 2, 3], device=s.device)
    yield s.length - 1, s.length, s.attend(q[cu[1:] - 1], k, v, cu_seqlens_q=last, cu_seqlens_k=cu)[1:2]


def cached(s: Sequence) -> Rows:
    """In a row with padding before it, beside a longer row."""
    pad = 5
    _, k, v = s.random(2, s.length + 9)
    for begin, end in ((s.length - 1, s.length), (40, 90)):
        k[1, pad : pad + end], v[1, pad : pad + end] = s.k[0, :end], s.v[0, :end]
        q = torch.cat([s.random(1, end - begin)[0], s.q[:, begin:end]])
        lengths = torch.tensor([k.shape[1], pad + end], device=s.device)
        starts = torch.tensor([0, pad], device=s.device)
        yield begin, end, s.attend_cached(q, k, v, cache_seqlens=lengths, cache_leftpad=starts)[1]


def paged(s: Sequence) -> Rows:
    """Appended to pages in random order."""
    size = 16
    table = torch.randperm(-(-s.length // size), device=s.device).int()[None]
    k, v = (torch.zeros(table.numel(), size, *x.shape[2:], dtype=s.dtype, device=s.device) for x in (s.k, s.v))
    for begin, end in ((0, 60), (60, s.length - 1), (s.length - 1, s.length)):
        new = slice(begin, end)
        more = {"cache_seqlens": torch.tensor([begin], device=s.device), "block_table": table}
        yield begin, end, s.attend_cached(s.q[:, new], k, v, k=s.k[:, new], v=s.v[:, new], **more)[0]


def other_threads(s: Sequence) -> Rows:
    for n in (2, 3):
        with threads(n):
            yield 0, s.length, s.attend(s.q, s.k, s.v)[0]
            yield s.length - 1, s.length, s.attend(s.q[:, -1:], s.k, s.v)[0]


FORMS = (steps, chunks, in_a_batch, packed, cached, paged, other_threads)
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one key head": {"kv_heads": 1},
    "window": {"window": (80, 0)},
    "softcap": {"softcap": 2.0},
    "sinks and slopes": {"sinks": torch.tensor([1.0, -2.0]), "alibi_slopes": torch.tensor([0.01, 0.003])},
}


def check(s: Sequence, forms: tuple[Callable[[Sequence], Rows], ...]) -> None:
    """Every form gives the bits of one pass over the sequence alone."""
    whole = s.attend(s.q, s.k, s.v)[0]
    for form in forms:
        for begin, end, rows in form(s):
            assert torch.equal(rows, whole[begin:end]), f"{form.__name__}: rows {begin} to {end}"


@pytest.mark.parametrize("feature", FEATURES)
def test_bits_depend_on_nothing_but_what_a_row_sees(backend, feature):
    check(Sequence(backend, torch.float16, **FEATURES[feature]), FORMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 80])
def test_head_dims(backend, dim, dtype):
    if backend == "triton" and (not ON_GPU or dtype == torch.float64):
        pytest.skip("interpreted, only products of a few values are exact")
    check(Sequence(backend, dtype, dim), (steps, chunks, in_a_batch, paged))


def test_without_it_a_step_may_differ():
    """Else these tests would show nothing."""
    s = Sequence("cpu", torch.float32, 64, batch_invariant=False)
    with pytest.raises(AssertionError, match="steps: rows"):
        check(s, (steps,))


def test_it_is_carried_to_the_kernels_under_autograd_and_compile():
    s = Sequence("cpu", torch.float32, 64)
    q, k, v = s.q[:, -1:], s.k, s.v
    whole = s.attend(s.q, k, v)[:, -1:]
    assert torch.equal(s.attend(q.clone().requires_grad_(), k, v), whole)
    assert torch.equal(torch.compile(s.attend, fullgraph=True, backend="aot_eager")(q, k, v), whole)
    assert torch.equal(torch.vmap(lambda q: s.attend(q, k, v))(q[None])[0], whole)
    _, pullback = torch.func.vjp(lambda q: s.attend(q, k, v), q)
    assert pullback(torch.ones_like(whole))[0].isfinite().all()


def test_it_changes_no_more_than_the_order_of_sums(backend):
    s = Sequence(backend, torch.float16)
    for q in (s.q, s.q[:, -1:]):
        want = s.attend(q, s.k, s.v, batch_invariant=False)
        torch.testing.assert_close(s.attend(q, s.k, s.v), want, rtol=2e-3, atol=2e-3)


def test_the_reference_refuses():
    q = torch.randn(1, 3, 1, 8)
    with pytest.raises(ValueError, match="'reference' cannot serve this call: batch_invariant=True: the order of its"):
        onchip.attention(q, q, q, batch_invariant=True, backend="reference")
    explanation = str(onchip.explain(onchip.attention, q, q, q, batch_invariant=True))
    assert "reference  cannot serve: batch_invariant=True" in explanation
    wide = torch.randn(1, 3, 1, 513)
    with pytest.raises(
        ValueError, match=r"no implementation can serve this call: cpu: head dims go to 512, .*reference"
    ):
        onchip.attention(wide, wide, wide, batch_invariant=True)
    with pytest.raises(TypeError, match="batch_invariant must be True or False, got 1"):
        onchip.attention(q, q, q, batch_invariant=1)
