"""What the benchmark holds itself to: right results before times, and work counted right."""

import dataclasses

import pytest
import torch

import onchip
from onchip.bench import attention, memory
from onchip.bench.cases import GPU_SUITES, SUITES, Case, cases
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
    dataclasses.replace(SQUARE, batch=2, alone=True),
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


def test_a_backward_pass_alone_runs_no_forward_pass(monkeypatch):
    right, runs = onchip.attention, []
    monkeypatch.setattr(onchip, "attention", lambda *args, **options: runs.append(args) or right(*args, **options))
    alone, both = (dataclasses.replace(SQUARE, alone=alone) for alone in (True, False))
    assert both.operations / alone.operations == 3.5 / 2.5
    for case, expected in ((alone, 1), (both, 3)):
        runs.clear()
        call = attention.contender("onchip", case, CPU).call
        first, *others = (call() for _ in range(3))
        assert len(runs) == expected
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_cases_on_a_gpu_are_those_of_the_papers():
    for suite in ("forward", "backward"):
        for case in cases(suite, device="cuda"):
            assert case.dtype == "bfloat16"
            assert case.batch * case.q_len == 16384 and case.heads * case.head_dim == 2048
            full = 4 * case.q_len**2 * case.head_dim * case.heads * case.batch * (2.5 if suite == "backward" else 1)
            assert case.operations == pytest.approx(full / 2 if case.causal else full, rel=1e-3)
    (decode,) = cases("decode", device="cuda")
    assert (decode.heads, decode.heads_kv, decode.head_dim, decode.k_len) == (32, 8, 128, 65536)
    assert decode.cache_bytes == 2 * 2 * 65536 * 8 * 128


def test_rates_are_work_over_time():
    row = attention.measure(dataclasses.replace(SQUARE, alone=True), CPU, describe("cpu", "default"), seconds=0.0)
    for name in ("onchip", "sdpa_math"):
        assert row.rate[name] == pytest.approx(row.case.operations / row.ms[name].median * 1e-9, rel=1e-2)


@pytest.mark.parametrize("device, suites", [("cpu", SUITES), ("cuda", GPU_SUITES)])
def test_every_suite_has_cases_that_run_when_small(device, suites):
    for suite in suites:
        for case in cases(suite, lengths=[16], head_dims=[8], quick=True, device=device):
            tiny = dataclasses.replace(case, heads=2, heads_kv=2, batch=1)
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
