"""What the benchmark holds itself to: right results before times, and work counted right."""

import dataclasses

import pytest
import torch

import onchip
from onchip.bench import attention, memory
from onchip.bench.cases import SUITES, Case, cases
from onchip.bench.machine import describe
from onchip.ops.attention import reference

CPU = torch.device("cpu")
SQUARE = Case("backward", "float32", 4, 2, 24, 24, 8, causal=True, grad=True)
CASES = [
    SQUARE,
    dataclasses.replace(SQUARE, causal=False, k_len=40),
    dataclasses.replace(SQUARE, window=5),
    dataclasses.replace(SQUARE, q_len=7, k_len=24, grad=False),
    Case("decode", "bfloat16", 8, 2, 1, 33, 16),
]


def seen(case):
    i = torch.arange(case.q_len)[:, None] + case.k_len - case.q_len
    j = torch.arange(case.k_len)[None, :]
    mask = torch.ones(case.q_len, case.k_len, dtype=torch.bool)
    if case.causal:
        mask &= j <= i
    if case.window:
        mask &= j > i - case.window
    return mask


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pairs_are_those_the_mask_leaves(case):
    assert case.pairs == seen(case).sum()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_truth_in_blocks_is_the_definition_in_one_piece(case, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 5)
    inputs = attention.Inputs.random(case, CPU)
    group = case.heads // case.heads_kv
    q, k, v, grad_out = (x.detach()[:, :, :n].double() for x, n in zip(
        (inputs.q, inputs.k, inputs.v, inputs.grad_out), (group, 1, 1, group), strict=True))  # fmt: skip
    whole = [x.requires_grad_() for x in (q, k, v)]
    out, _ = reference.attention_with_lse(*whole, bias=seen(case)[None, None])
    want = (out, *torch.autograd.grad(out, whole, grad_out)) if case.grad else (out,)
    for found, expected in zip(attention.truth(case, inputs), want, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contenders_agree(case):
    ours = attention.contender("onchip", case, CPU)
    names = attention.peers(case, CPU)
    assert "sdpa_math" in names
    for name in names:
        attention.check(case, ours, attention.contender(name, case, CPU))


def test_a_wrong_result_is_not_timed(monkeypatch):
    right = onchip.attention
    monkeypatch.setattr(onchip, "attention", lambda q, k, v, **options: right(q, k, v, **options) * (1 + 1e-4))
    monkeypatch.setattr(attention, "interleave", None)
    with pytest.raises(ArithmeticError, match="out is off by"):
        attention.measure(SQUARE, CPU, describe("cpu", "default"))


def test_every_suite_has_cases_that_run_when_small():
    for suite in SUITES:
        for case in cases(suite, lengths=[16], head_dims=[8], quick=True):
            tiny = dataclasses.replace(case, heads=2, heads_kv=2)
            names = ["onchip", *attention.peers(tiny, CPU)]
            assert len(names) > 1
            for name in names:
                assert all(x.isfinite().all() for x in attention.contender(name, tiny, CPU).results())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
def test_flex_serves_the_window():
    case = Case("window", "float32", 2, 2, 64, 64, 16, causal=True, window=9)
    assert "flex" in attention.peers(case, CPU, flex=True)
    attention.check(case, attention.contender("onchip", case, CPU), attention.contender("flex", case, CPU))


def test_memory_of_written_logits_is_seen():
    case = Case("memory", "float32", 8, 8, 512, 512, 64)
    logits, inputs_and_output = 8 * 512**2 * 4, 4 * 8 * 512 * 64 * 4
    assert memory.extra_in_subprocess(case, "sdpa_math", CPU) > logits / inputs_and_output


def test_a_probe_that_fails_says_so():
    with pytest.raises(RuntimeError, match="measuring the memory of nobody"):
        memory.extra_in_subprocess(SQUARE, "nobody", CPU)
