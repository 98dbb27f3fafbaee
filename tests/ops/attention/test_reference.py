"""The definition against sums written out with Python's own numbers, one logit at a time; and its derivatives."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import onchip

from . import cases
from .support import Case, differentiate, randn_case, run
from .tolerance import assert_exact

F64 = torch.float64


def by_hand(call: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, straight from the formula in `onchip.attention`'s docstring."""
    q, k, v = (call[name].numpy() for name in "qkv")
    (batch, tq, heads, dim), (tk, kv_heads) = q.shape, k.shape[1:3]
    out, lse = np.zeros((batch, tq, heads, v.shape[-1])), np.full((batch, heads, tq), -math.inf)
    for b, h, i in np.ndindex(batch, heads, tq):
        kv_head = h // (heads // kv_heads)
        logits = {}
        for j in range(tk):
            product = math.fsum(float(x) * float(y) for x, y in zip(q[b, i, h], k[b, j, kv_head], strict=True))
            logit = logit_by_hand(
                call, b, h, i, j, product * (call["scale"] if call["scale"] is not None else dim**-0.5)
            )
            if logit > -math.inf:
                logits[j] = logit
        terms = [*logits.values(), *([] if call["sinks"] is None else [call["sinks"][h].item()])]
        if terms:
            top = max(terms)
            lse[b, h, i] = top + math.log(math.fsum(math.exp(s - top) for s in terms))
        for j, logit in logits.items():
            kept = kept_by_hand(call, b, h, i, j)
            out[b, i, h] += kept * math.exp(logit - lse[b, h, i]) * v[b, j, kv_head]
    return torch.from_numpy(out), torch.from_numpy(lse)


def logit_by_hand(call: Case, b: int, h: int, i: int, j: int, t: float) -> float:
    position = i + call["k"].shape[1] - call["q"].shape[1]
    left, right = call["window"] or (None, None)
    if (call["causal"] and j > position) or (left is not None and j < position - left):
        return -math.inf
    if right is not None and j > position + right:
        return -math.inf
    if call["softcap"]:
        t = call["softcap"] * math.tanh(t / call["softcap"])
    if call["alibi_slopes"] is not None:
        slopes = call["alibi_slopes"]
        t -= (slopes[h] if slopes.ndim == 1 else slopes[b, h]).item() * abs(position - j)
    if call["bias"] is not None:
        shape = (call["q"].shape[0], call["q"].shape[2], call["q"].shape[1], call["k"].shape[1])
        bias = call["bias"].expand(shape)[b, h, i, j].item()
        return t + bias if call["bias"].dtype != torch.bool else t if bias else -math.inf
    return t


def kept_by_hand(call: Case, b: int, h: int, i: int, j: int) -> float:
    """What the probability is multiplied by: 0 where dropped."""
    if not call["dropout_p"]:
        return 1.0
    word, x, key = 2**32, [j // 4, i, h, b], [call["seed"] % 2**32, call["seed"] // 2**32]
    for _ in range(10):
        first, second = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [second // word ^ x[1] ^ key[0], second % word, first // word ^ x[3] ^ key[1], first % word]
        key = [(key[0] + 0x9E3779B9) % word, (key[1] + 0xBB67AE85) % word]
    return 0.0 if x[j % 4] < math.floor(call["dropout_p"] * word) else 1 / (1 - call["dropout_p"])


def small(call: Case) -> bool:
    q, k = call["q"].shape, call["k"].shape
    return q[0] * q[1] * q[2] * k[1] * q[3] < 20_000


@given(call=cases.calls(F64).filter(small))
@settings(max_examples=60, suppress_health_check=["filter_too_much", "too_slow"])
def test_against_plain_loops(call):
    got = run(call, "reference")
    assert_exact(got, dict(zip(("out", "lse"), by_hand(call), strict=True)))


@pytest.mark.parametrize("tq, tk", [(3, 7), (7, 3), (5, 5)])
def test_the_last_query_sees_the_last_key(tq, tk):
    q, k, v = torch.zeros(1, tq, 1, 4), torch.zeros(1, tk, 1, 4), torch.eye(tk)[None, :, None]
    seen = onchip.attention(q, k, v, causal=True, backend="reference")[0, :, 0] > 0  # v picks out the probabilities
    assert torch.equal(seen, torch.ones(tq, tk).tril(tk - tq).bool())


@given(call=cases.packed(F64))
@settings(max_examples=40)
def test_packed_is_one_by_one(call):
    call.arguments["dropout_p"] = 0.0  # whose mask depends on the sequence's number: see test_dropout.py

    def one_by_one(*, q, k, v, cu_seqlens_q, cu_seqlens_k=None, bias=None, alibi_slopes=None, **more):
        starts = [cu.tolist() for cu in (cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k)]
        outs, lses = [q[:0, :, :1].expand(-1, -1, v.shape[-1])], [q[:0, :, 0].T]
        for b in range(len(starts[0]) - 1):
            (q0, q1), (k0, k1) = (s[b : b + 2] for s in starts)
            out, lse = onchip.attention_with_lse(
                q[None, q0:q1],
                k[None, k0:k1],
                v[None, k0:k1],
                bias=None if bias is None else corner(bias, b, q1 - q0, k1 - k0),
                alibi_slopes=alibi_slopes if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes[b],
                backend="reference",
                **more,
            )
            outs.append(out[0])
            lses.append(lse[0])
        return torch.cat(outs), torch.cat(lses, 1)

    def corner(bias, b, tq, tk):
        bias = bias[(None,) * (4 - bias.ndim)]
        sizes = zip(((b, b + 1), (0, None), (0, tq), (0, tk)), bias.shape, strict=True)
        return bias[tuple(slice(*wanted) if n > 1 else slice(None) for wanted, n in sizes)]

    assert_exact(run(call, "reference"), differentiate(call, one_by_one))


EMPTY_ROWS = {
    "no keys": (3, 0, {}),
    "causal": (5, 2, {"causal": True}),
    "window": (4, 2, {"window": (0, 0)}),
    "boolean bias": (2, 3, {"bias": torch.tensor([[True], [False]])}),
    "bias of -inf": (2, 3, {"bias": torch.tensor([[0.0], [-torch.inf]], dtype=F64)}),
    "sink of -inf": (3, 0, {"sinks": torch.tensor([-torch.inf, 0.0], dtype=F64)}),
}


@pytest.mark.parametrize("tq, tk, more", EMPTY_ROWS.values(), ids=EMPTY_ROWS)
def test_an_empty_row_gives_zeros_whatever_is_differentiated(tq, tk, more):
    q, k, v = (torch.randn(1, t, 2, 4, dtype=F64, requires_grad=True) for t in (tq, tk, tk))
    out, lse = onchip.attention_with_lse(q, k, v, backend="reference", **more)
    empty = (lse[0] == -torch.inf).T  # (Tq, H)
    assert empty.any() and (out[0][empty] == 0).all()
    weights = torch.randn_like(out, requires_grad=True), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), (q, k, v), weights, create_graph=True)
    assert (grads[0][0][empty] == 0).all()
    loss = sum(grad.square().sum() for grad in grads)
    second = torch.autograd.grad(loss, (q, k, v, weights[0]), materialize_grads=True)
    assert all(x.isfinite().all() for x in (*grads, *second))


def test_a_finite_bias_hides_nothing_by_itself():
    call = randn_case(1, 3, 4, 1, bias=torch.full((4,), -1e4, dtype=F64))
    plain = randn_case(1, 3, 4, 1)
    plain.arguments.update({name: call[name] for name in "qkv"})
    torch.testing.assert_close(run(call, "reference")["out"], run(plain, "reference")["out"])


DERIVATIVES = {
    "everything": {
        "causal": True,
        "softcap": 2.0,
        "bias": torch.randn(2, 1, 3, 1, dtype=F64),
        "alibi_slopes": torch.rand(2, 4, dtype=F64),
        "sinks": torch.randn(4, dtype=F64),
    },
    "window": {"window": (1, 1), "scale": -0.7},
}


@pytest.mark.parametrize("more", DERIVATIVES.values(), ids=DERIVATIVES)
def test_first_and_second_derivatives(more):
    call = randn_case(2, 3, 5, 4, kv_heads=2, dim=3, value_dim=2, **more)
    tensors = {n: x.requires_grad_() for n, x in call.arguments.items() if isinstance(x, torch.Tensor)}

    def function(*values):
        arguments = call.arguments | dict(zip(tensors, values, strict=True))
        return onchip.attention_with_lse(**arguments, backend="reference")

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))
    assert torch.autograd.gradgradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_computed_in_float32(dtype):
    call = randn_case(1, 9, 9, 2).to(dtype)
    got, want = run(call, "reference"), run(call.to(torch.float32), "reference")
    assert torch.equal(got["lse"], want["lse"])
    assert torch.equal(got["out"], want["out"].to(dtype))
