"""What attention refuses, and that its sentence names the argument, what was expected and what came."""

import math

import pytest
import torch

import onchip

Q, K = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8)
ROWS = torch.randn(9, 4, 8)
CU = torch.tensor([0, 4, 9])


def packed(**changed):
    return {"q": ROWS, "k": ROWS, "v": ROWS, "cu_seqlens_q": CU} | changed


# what is wrong: (the arguments changed, the exception, what its message holds)
WRONG = {
    "not a tensor": ({"q": [1.0]}, TypeError, ["q must be a tensor", "list"]),
    "k not a tensor": ({"k": None}, TypeError, ["k must be a tensor", "NoneType"]),
    "integers": ({"q": Q.int()}, TypeError, ["q must be float", "torch.int32"]),
    "integer values": ({"v": K.long()}, TypeError, ["v must be float", "torch.int64"]),
    "complex": ({"q": Q.to(torch.complex64)}, TypeError, ["q must be float", "torch.complex64"]),
    "float8": ({"k": K.to(torch.float8_e5m2)}, TypeError, ["k must be float", "float8"]),
    "rank 3": ({"q": Q[0]}, ValueError, ["q must have 4 dimensions", "(5, 4, 8)"]),
    "rank 5": ({"v": K[None]}, ValueError, ["v must have 4 dimensions", "(1, 2, 7, 2, 8)"]),
    "mixed dtypes": ({"k": K.double()}, TypeError, ["k must have q's dtype", "float32", "float64"]),
    "mixed devices": ({"v": K.to("meta")}, TypeError, ["v must have q's dtype and device", "cpu", "meta"]),
    "head dims": ({"k": K[..., :7]}, ValueError, ["k must have q's head dim 8", "(2, 7, 2, 7)"]),
    "head dim 0": ({"q": Q[..., :0], "k": K[..., :0]}, ValueError, ["head dims must be at least 1", "got 0"]),
    "value dim 0": ({"v": K[..., :0]}, ValueError, ["head dims must be at least 1", "0 for v"]),
    "batches": ({"q": Q[:1]}, ValueError, ["k must have q's batch size 1", "(2, 7, 2, 8)"]),
    "value batches": ({"v": K[:1]}, ValueError, ["v must have k's batch", "(2, 7, 2)", "(1, 7, 2, 8)"]),
    "value lengths": ({"v": K[:, :6]}, ValueError, ["v must have k's", "time", "(2, 6, 2, 8)"]),
    "value heads": ({"v": K[:, :, :1]}, ValueError, ["v must have k's", "heads", "(2, 7, 1, 8)"]),
    "heads no multiple": ({"q": Q[:, :, :3]}, ValueError, ["heads must be a multiple of k's", "3 and 2"]),
    "more key heads": ({"q": Q[:, :, :1]}, ValueError, ["heads must be a multiple of k's", "1 and 2"]),
    "no heads": ({"q": Q[:, :, :0]}, ValueError, ["heads must be a multiple of k's", "0 and 2"]),
    "no key heads": ({"k": K[:, :, :0], "v": K[:, :, :0]}, ValueError, ["heads must be a multiple", "4 and 0"]),
    "causal": ({"causal": "yes"}, TypeError, ["causal must be True or False", "'yes'"]),
    "causal as a number": ({"causal": 1}, TypeError, ["causal must be True or False", "1"]),
    "window of one": ({"window": 5}, ValueError, ["window must be a pair (left, right)", "5"]),
    "window of three": ({"window": (1, 2, 3)}, ValueError, ["window must be a pair", "(1, 2, 3)"]),
    "negative window": ({"window": (-2, 0)}, ValueError, ["window's left", "at least 0", "-2"]),
    "negative right": ({"window": (None, -1)}, ValueError, ["window's right", "at least 0", "-1"]),
    "window of -1": ({"window": (-1, -1)}, ValueError, ["window's left", "None (unbounded)", "-1"]),
    "fractional window": ({"window": (0, 1.5)}, ValueError, ["window's right", "integer", "1.5"]),
    "boolean window": ({"window": (True, 0)}, ValueError, ["window's left", "integer", "True"]),
    "NaN scale": ({"scale": float("nan")}, ValueError, ["scale must be finite", "nan"]),
    "infinite scale": ({"scale": float("inf")}, ValueError, ["scale must be finite", "inf"]),
    "text as scale": ({"scale": "1"}, TypeError, ["scale must be a number", "str"]),
    "tensor as scale": ({"scale": torch.tensor(0.1)}, TypeError, ["scale must be a number", "Tensor"]),
    "negative softcap": ({"softcap": -1.0}, ValueError, ["softcap must be finite and not negative", "-1.0"]),
    "NaN softcap": ({"softcap": float("nan")}, ValueError, ["softcap must be finite", "nan"]),
    "no softcap": ({"softcap": None}, TypeError, ["softcap must be a number", "NoneType"]),
    "bias not a tensor": ({"bias": 1.0}, TypeError, ["bias must be a tensor", "float"]),
    "integer bias": (
        {"bias": torch.ones(5, 7, dtype=torch.int32)},
        TypeError,
        ["bias must be floating or boolean", "int32"],
    ),
    "bias shape": ({"bias": torch.ones(7, 5)}, ValueError, ["bias must be broadcastable to (2, 4, 5, 7)", "(7, 5)"]),
    "bias per key head": ({"bias": torch.ones(2, 2, 5, 7)}, ValueError, ["(2, 4, 5, 7)", "(2, 2, 5, 7)"]),
    "bias rank": ({"bias": torch.ones(1, 1, 1, 1, 1)}, ValueError, ["bias must be broadcastable", "(1, 1, 1, 1, 1)"]),
    "bias device": ({"bias": torch.ones(5, 7, device="meta")}, TypeError, ["bias must be on q's device", "meta"]),
    "slopes shape": (
        {"alibi_slopes": torch.ones(2)},
        ValueError,
        ["alibi_slopes must have shape (4,) or (2, 4)", "(2,)"],
    ),
    "slopes rank": ({"alibi_slopes": torch.ones(1, 4)}, ValueError, ["alibi_slopes must have shape", "(1, 4)"]),
    "integer slopes": ({"alibi_slopes": torch.ones(4).int()}, TypeError, ["alibi_slopes must be floating", "int32"]),
    "boolean slopes": ({"alibi_slopes": torch.ones(4).bool()}, TypeError, ["alibi_slopes must be floating", "bool"]),
    "sinks shape": ({"sinks": torch.ones(2, 4)}, ValueError, ["sinks must have shape (4,)", "(2, 4)"]),
    "sinks per key head": ({"sinks": torch.ones(2)}, ValueError, ["sinks must have shape (4,)", "(2,)"]),
    "boolean sinks": ({"sinks": torch.ones(4).bool()}, TypeError, ["sinks must be floating", "bool"]),
    "everything dropped": ({"dropout_p": 1}, ValueError, ["dropout_p must be at least 0 and below 1", "1"]),
    "negative dropout_p": ({"dropout_p": -0.1}, ValueError, ["dropout_p must be at least 0 and below 1", "-0.1"]),
    "dropout_p NaN": ({"dropout_p": math.nan}, ValueError, ["dropout_p must be at least 0 and below 1", "nan"]),
    "dropout_p a tensor": ({"dropout_p": torch.tensor(0.1)}, TypeError, ["dropout_p must be a number", "Tensor"]),
    "dropout_p a truth": ({"dropout_p": True}, TypeError, ["dropout_p must be a number", "bool"]),
    "negative seed": ({"seed": -1}, ValueError, ["seed must be at least 0 and below 2**63", "-1"]),
    "seed too large": ({"seed": 2**63}, ValueError, ["seed must be at least 0 and below 2**63", str(2**63)]),
    "fractional seed": ({"seed": 1.0}, TypeError, ["seed must be an integer or None", "float"]),
    "seed a truth": ({"seed": True}, TypeError, ["seed must be an integer or None", "bool"]),
    "backend": (
        {"backend": "cuda"},
        ValueError,
        ["backend must be None or one of 'cpu', 'triton', 'reference'", "'cuda'"],
    ),
    "boundaries of keys alone": (
        {"cu_seqlens_k": CU},
        ValueError,
        ["cu_seqlens_q must be given where cu_seqlens_k is"],
    ),
    "boundaries of a batch": (
        {"cu_seqlens_q": CU},
        ValueError,
        ["q must have 3 dimensions", "cu_seqlens_q", "(2, 5, 4, 8)"],
    ),
    "a list of boundaries": (
        packed(cu_seqlens_q=[0, 9]),
        TypeError,
        ["cu_seqlens_q must be an int32 or int64 tensor", "list"],
    ),
    "fractional boundaries": (
        packed(cu_seqlens_q=CU.float()),
        TypeError,
        ["cu_seqlens_q", "int32 or int64", "float32"],
    ),
    "boundaries elsewhere": (
        packed(cu_seqlens_q=CU.to("meta")),
        TypeError,
        ["cu_seqlens_q must be on q's device", "meta"],
    ),
    "boundaries' rank": (
        packed(cu_seqlens_q=CU[None]),
        ValueError,
        ["cu_seqlens_q must have shape (sequences + 1,)", "(1, 3)"],
    ),
    "no boundaries": (
        packed(cu_seqlens_q=CU[:0]),
        ValueError,
        ["cu_seqlens_q must have shape (sequences + 1,)", "(0,)"],
    ),
    "numbers of boundaries": (
        packed(cu_seqlens_k=CU[:2]),
        ValueError,
        ["cu_seqlens_k must have cu_seqlens_q's length 3", "2"],
    ),
    "boundaries from 1": (
        packed(cu_seqlens_q=torch.tensor([1, 9])),
        ValueError,
        ["cu_seqlens_q must run from 0", "9", "1 to 9"],
    ),
    "boundaries too short": (
        packed(cu_seqlens_q=torch.tensor([0, 8])),
        ValueError,
        ["cu_seqlens_q", "rows 9", "0 to 8"],
    ),
    "boundaries too long": (
        packed(cu_seqlens_k=torch.tensor([0, 5, 10])),
        ValueError,
        ["cu_seqlens_k", "rows 9", "0 to 10"],
    ),
    "unsorted": (
        packed(cu_seqlens_q=torch.tensor([0, 6, 4, 9])),
        ValueError,
        ["cu_seqlens_q must not descend", "6 followed by 4"],
    ),
    "negative": (packed(cu_seqlens_q=torch.tensor([0, -2, 9])), ValueError, ["cu_seqlens_q must not descend", "-2"]),
    "packed bias": (packed(bias=torch.ones(5, 4)), ValueError, ["bias must be broadcastable", "(5, 5)", "(5, 4)"]),
    "packed bias's batch": (
        packed(bias=torch.ones(3, 1, 5, 5)),
        ValueError,
        ["bias must be broadcastable to (2, 4", "(3, 1, 5, 5)"],
    ),
    "packed slopes": (
        packed(alibi_slopes=torch.ones(3, 4)),
        ValueError,
        ["alibi_slopes must have shape (4,) or (2, 4)"],
    ),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("changed, kind, words", WRONG.values(), ids=WRONG)
def test_refused(changed, kind, words, backend):
    with pytest.raises(kind) as error:
        onchip.attention(**({"q": Q, "k": K, "v": K, "backend": backend} | changed))
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("changed, kind, words", WRONG.values(), ids=WRONG)
def test_refused_with_gradients_alike(changed, kind, words):
    arguments = {"q": Q, "k": K, "v": K} | changed
    if arguments["q"] is Q:
        arguments["q"] = Q.clone().requires_grad_()
    with pytest.raises(kind):
        onchip.attention_with_lse(**arguments)


@pytest.mark.parametrize("name", ["not a tensor", "k not a tensor", "integers", "integer values", "head dims"])
def test_refused_under_autocast_alike(name):
    changed, kind, words = WRONG[name]
    with pytest.raises(kind) as error, torch.autocast("cpu", torch.bfloat16):
        onchip.attention(**({"q": Q, "k": K, "v": K} | changed))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="deterministic"):
        onchip.attention(Q, K, K, deterministic=True)
    with pytest.raises(TypeError, match="positional"):
        onchip.attention(Q, K, K, True)


ARGUMENTS = {
    "causal": True,
    "window": (1, 0),
    "scale": 0.1,
    "softcap": 0.5,
    "bias": torch.randn(5, 7),
    "boolean bias": torch.arange(7) < 3,
    "alibi_slopes": torch.ones(4),
    "sinks": torch.ones(4),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_nothing_accepted_is_ignored(name):
    plain = onchip.attention_with_lse(Q, K, K)
    other = onchip.attention_with_lse(Q, K, K, **{name.removeprefix("boolean "): ARGUMENTS[name]})
    assert not any(torch.allclose(a, b) for a, b in zip(plain, other, strict=True))
