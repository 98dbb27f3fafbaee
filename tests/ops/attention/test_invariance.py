"""What may not change a result's bits, and what a row may not see."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import onchip

from . import cases
from .support import DIFFERENTIABLE, LOW, Case, randn_case, run, threads
from .tolerance import assert_same

DTYPES = (torch.float64, *LOW)
LENGTHS = [(90, 90), (150, 260), (2, 2100)]  # the last decodes


def with_everything(*shape: int, dtype=torch.float32, **more) -> Case:
    batch, _, tk, heads = shape
    score = {"bias": torch.randn(heads, 1, tk), "alibi_slopes": torch.rand(batch, heads), "sinks": torch.randn(heads)}
    return randn_case(*shape, **(score | more)).to(dtype)


def rows(call: Case, *, sequence: int) -> Case:
    """The call with one sequence of its batch alone."""
    one = slice(sequence, sequence + 1)
    alone = {n: call[n][one] for n in ("q", "k", "v", "alibi_slopes")}
    return Case(call.arguments | alone, call.grad_out[one], call.grad_lse[one])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tq, tk", [(400, 500), (1, 4000)])
def test_the_same_bits_on_every_run_and_any_number_of_threads(backend, tq, tk, dtype):
    call = with_everything(2, tq, tk, 4, kv_heads=2, dim=32, dtype=dtype, causal=True)
    want = run(call, backend)
    for n in (1, 2, 2, 2, 3):
        with threads(n):
            assert_same(run(call, backend), want)


@pytest.mark.parametrize("lengths", [(700, 300, 700), (700, 0, 700), (700, 0, 0, 700, 700, 0, 700), (5, 1500, 1, 700)])
def test_the_same_bits_for_packed_sequences_too(backend, lengths):
    """A sequence without keys between others: what those share in the kernel must not pass through its hands."""
    cu = torch.tensor([0, *lengths]).cumsum(0)
    call = randn_case(sum(lengths), sum(lengths), 1, dim=64, causal=True, cu_seqlens_q=cu).to(torch.float32)
    want = run(call, backend)
    for _ in range(10):
        with threads(2):
            assert_same(run(call, backend), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tq, tk", LENGTHS)
def test_the_rest_of_the_batch_changes_no_bit(backend, tq, tk, dtype):
    call = with_everything(3, tq, tk, 4, kv_heads=2, dim=32, dtype=dtype, window=(100, 3))
    call["q"][0] = torch.nan
    call["k"][2] = torch.inf
    alone, together = run(rows(call, sequence=1), backend), run(call, backend)
    assert all(torch.equal(alone[name][0], together[name][1]) for name in ("out", "lse", "q", "k", "v", "alibi_slopes"))


@pytest.mark.parametrize("tq, tk", LENGTHS)
def test_the_other_heads_change_no_bit(backend, tq, tk):
    call = with_everything(2, tq, tk, 4, kv_heads=2, dim=32)
    call["v"][:, :, 0] = torch.nan
    names = {"q": slice(2, 4), "k": slice(1, 2), "v": slice(1, 2)}
    alone = {n: call[n][:, :, heads] for n, heads in names.items()}
    alone |= {"bias": call["bias"][2:], "alibi_slopes": call["alibi_slopes"][:, 2:], "sinks": call["sinks"][2:]}
    one = run(Case(call.arguments | alone, call.grad_out[:, :, 2:], call.grad_lse[:, 2:]), backend)
    assert_same(one, {n: x for n, x in two_heads_of(run(call, backend), names).items() if n in ("out", "lse", *names)})


def two_heads_of(results: dict[str, torch.Tensor], names: dict[str, slice]) -> dict[str, torch.Tensor]:
    taken = {name: results[name][:, :, heads] for name, heads in names.items()}
    return taken | {"out": results["out"][:, :, 2:], "lse": results["lse"][:, 2:]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@settings(max_examples=25)
def test_packed_is_one_by_one(backend, dtype, data):
    call = data.draw(cases.packed(dtype))
    call.arguments["dropout_p"] = 0.0  # whose mask depends on the sequence's number: see test_dropout.py
    together = run(call, backend)
    starts_q = call["cu_seqlens_q"].tolist()
    starts_k = starts_q if call["cu_seqlens_k"] is None else call["cu_seqlens_k"].tolist()
    for b in range(len(starts_q) - 1):
        q, k = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        alone = run(_sequence(call, b, q, k), backend)
        assert torch.equal(alone["lse"][0], together["lse"][:, q])
        assert all(
            torch.equal(alone[n][0], together[n][part]) for n, part in (("out", q), ("q", q), ("k", k), ("v", k))
        )


def _sequence(call: Case, b: int, q: slice, k: slice) -> Case:
    arguments = {n: x for n, x in call.arguments.items() if not n.startswith("cu_seqlens")}
    arguments |= {"q": call["q"][None, q], "k": call["k"][None, k], "v": call["v"][None, k]}
    if call["bias"] is not None:
        bias = call["bias"][(None,) * (4 - call["bias"].ndim)]
        wanted = (slice(b, b + 1), slice(None), slice(q.stop - q.start), slice(k.stop - k.start))
        arguments["bias"] = bias[tuple(w if n > 1 else slice(None) for w, n in zip(wanted, bias.shape, strict=True))]
    if call["alibi_slopes"] is not None and call["alibi_slopes"].ndim == 2:
        arguments["alibi_slopes"] = call["alibi_slopes"][b]
    return Case(arguments, call.grad_out[None, q], call.grad_lse[None, :, q])


def outputs(call: Case, backend: str, **changed: torch.Tensor) -> torch.Tensor:
    """(B, Tq, H, Dv + 1): out and lse of every row."""
    out, lse = onchip.attention_with_lse(**(call.arguments | changed), backend=backend)
    return torch.cat([out.to(lse.dtype), lse.transpose(1, 2)[..., None]], -1)


def rows_changed(call: Case, backend: str, **changed: torch.Tensor) -> list[int]:
    same = outputs(call, backend) == outputs(call, backend, **changed)
    return (~same.all(dim=(0, 2, 3))).nonzero().flatten().tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tq, tk", [(130, 130), (40, 150), (150, 60), (3, 1100)])
@pytest.mark.parametrize("window", [None, (50, 0), (3, 20)], ids=str)
def test_a_key_reaches_the_rows_that_see_it_and_no_other(backend, window, tq, tk, dtype):
    call = with_everything(1, tq, tk, 2, kv_heads=1, dim=32, dtype=dtype, causal=window is None, window=window)
    call["alibi_slopes"].mul_(0.01)  # no key so far away that its probability is zero
    left, right = (tk, 0) if window is None else window
    for j in (0, tk // 2, tk - 1):
        changed = {name: call[name].clone() for name in "kv"}
        for x in changed.values():
            x[:, j] += 4
        seeing = [i for i in range(tq) if -left <= j - (i + tk - tq) <= right]
        assert set(rows_changed(call, backend, **changed)) <= set(seeing)
        assert set(rows_changed(call, backend, **changed)) or not seeing


@pytest.mark.parametrize("tq, tk", LENGTHS)
def test_a_query_reaches_its_row_alone(backend, tq, tk):
    call = with_everything(1, tq, tk, 2, kv_heads=1, dim=32, causal=True)
    changed = call["q"].clone()
    changed[:, tq // 2] += 1
    assert rows_changed(call, backend, q=changed) == [tq // 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tq, tk", LENGTHS)
def test_causal_is_a_window_without_right(backend, tq, tk, dtype):
    call = with_everything(1, tq, tk, 2, dim=32, dtype=dtype)
    variants = [
        run(Case(call.arguments | more, call.grad_out, call.grad_lse), backend)
        for more in (
            {"causal": True},
            {"window": (None, 0)},
            {"causal": True, "window": (None, 5)},
            {"window": (tk, 0)},
            {"window": [2**63 - 1, 0]},
            {"window": (10**30, 0)},
        )
    ]
    for variant in variants[1:]:
        assert_same(variant, variants[0])


def test_a_window_as_long_as_the_sequence_is_none(backend):
    call = with_everything(1, 90, 90, 2, dim=32)
    wide = run(Case(call.arguments | {"window": (2**63 - 1, 2**63 - 1)}, call.grad_out, call.grad_lse), backend)
    assert_same(wide, run(call, backend))


def test_strides_change_no_bit(backend):
    call = with_everything(2, 90, 70, 4, kv_heads=2, dim=32)
    every_other = {n: torch.stack([call[n], call[n]], -1)[..., 0] for n in DIFFERENTIABLE}
    assert all(x.stride(-1) == 2 for x in every_other.values())
    strided = Case(call.arguments | every_other, call.grad_out, call.grad_lse)
    assert_same(run(strided, backend), run(call, backend))
