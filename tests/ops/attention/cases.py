"""The space of calls to attention, for hypothesis: shapes, features, broadcasts and strides."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .support import LAYOUTS, Case, case, lay_out

FEW = st.integers(0, 20)
LENGTHS = st.one_of(FEW, st.sampled_from([31, 63, 64, 65, 100, 127, 128, 129, 203, 257]))
SHORT = st.one_of(st.integers(1, 20), st.sampled_from([31, 33, 64, 65, 70]))
HEAD_DIMS = (1, 2, 3, 5, 8, 15, 16, 17, 24, 31, 32, 33, 48, 59, 64, 65, 80, 96, 111, 128, 129, 192, 256, 257, 511, 512)
PRODUCTS = 4_000_000  # multiplications of one q·kᵀ, at most: keeps an example to some milliseconds


@st.composite
def calls(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    """Any call that is not packed."""
    batch, kv_heads, group = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3, 5]))
    tq, tk = draw(LENGTHS), draw(LENGTHS)
    if draw(st.booleans()):
        tk = tq
    return draw(_any(dtype, batch, kv_heads, group, tq, tk))


@st.composite
def short_calls(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    """Any call that is not packed, of a size that can be interpreted."""
    group, tq, tk = draw(st.sampled_from([1, 2, 3])), draw(SHORT), draw(SHORT)
    return draw(_any(dtype, draw(st.integers(1, 2)), 1, group, tq, tk, st.sampled_from([1, 5, 16, 24, 65])))


@st.composite
def decodes(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    """Few rows a key head and many keys, which a kernel may serve differently."""
    group = draw(st.sampled_from([1, 1, 2, 4, 5, 8, 16]))
    tq = draw(st.integers(1, 16 // group))
    tk = draw(st.one_of(st.integers(1, 200), st.sampled_from([1023, 1024, 1025, 2500])))
    dim = st.sampled_from([8, 16, 32, 64, 64, 96, 128, 12, 50])
    return draw(_any(dtype, draw(st.integers(1, 2)), draw(st.integers(1, 2)), group, tq, tk, dim))


@st.composite
def packed(draw: st.DrawFn, dtype: torch.dtype, max_sequences: int = 5) -> Case:
    """Sequences of any lengths, empty ones among them."""
    kv_heads, group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2, 3]))
    pairs = draw(st.lists(st.tuples(LENGTHS, LENGTHS), max_size=max_sequences))
    if draw(st.booleans()):
        pairs = [(n, n) for n, _ in pairs]
    lengths = [max((pair[i] for pair in pairs), default=0) for i in (0, 1)]
    cu_q, cu_k = (
        _boundaries([pair[i] for pair in pairs], draw(st.sampled_from([torch.int32, torch.int64]))) for i in (0, 1)
    )
    starts: dict[str, Any] = {"cu_seqlens_q": cu_q}
    if not torch.equal(cu_q, cu_k) or draw(st.booleans()):
        starts["cu_seqlens_k"] = cu_k
    shapes = (int(cu_q[-1]), kv_heads * group), (int(cu_k[-1]), kv_heads)
    return draw(_tensors(dtype, *shapes, st.sampled_from(HEAD_DIMS[:17]), len(pairs), *lengths, starts))


def _any(dtype, batch, kv_heads, group, tq, tk, dims=None) -> st.SearchStrategy[Case]:
    heads = kv_heads * group
    most = max(PRODUCTS // max(batch * heads * tq * tk, 1), 1)
    dims = st.sampled_from([d for d in HEAD_DIMS if d <= most]) if dims is None else dims
    return _tensors(dtype, (batch, tq, heads), (batch, tk, kv_heads), dims, batch, tq, tk, {})


@st.composite
def _tensors(draw, dtype, q_shape, k_shape, dims, batch, tq, tk, starts) -> Case:
    torch.manual_seed(draw(st.integers(0, 1000)))
    heads, dim = q_shape[-1], draw(dims)
    value_dim = draw(st.one_of(st.just(dim), dims))
    layout = st.one_of(st.just("contiguous"), st.sampled_from(LAYOUTS))

    def tensor(*shape: int) -> Tensor:
        return lay_out(torch.randn(*shape).to(dtype), draw(layout))

    settings = draw(_settings(tk))
    if draw(st.booleans()):
        settings["bias"] = draw(_bias(dtype, (batch, heads, tq, tk)))
    if draw(st.booleans()):
        settings["alibi_slopes"] = lay_out(
            torch.randn(*draw(st.sampled_from([(), (batch,)])), heads).to(dtype), draw(layout)
        )
    if draw(st.booleans()):
        settings["sinks"] = lay_out(torch.randn(heads).to(dtype), draw(layout))
    q, k, v = tensor(*q_shape, dim), tensor(*k_shape, dim), tensor(*k_shape, value_dim)
    made = case(q, k, v, **settings, **starts)
    return Case(made.arguments, lay_out(made.grad_out, draw(layout)), lay_out(made.grad_lse, draw(layout)))


@st.composite
def _settings(draw: st.DrawFn, tk: int) -> dict[str, Any]:
    side = st.one_of(st.none(), st.integers(0, 8), st.integers(0, tk + 8))
    choices = {
        "causal": st.booleans(),
        "window": st.one_of(st.none(), st.tuples(side, side)),
        "scale": st.sampled_from([None, None, 0.0, 0.3, -0.2]),
        "softcap": st.sampled_from([0.0, 0.0, 1.5, 30.0]),
        "dropout_p": st.sampled_from([0.0, 0.0, 0.1, 0.9]),
        "seed": st.sampled_from([0, 1, 2**63 - 1]),
    }
    return {name: draw(values) for name, values in choices.items()}


@st.composite
def _bias(draw: st.DrawFn, dtype: torch.dtype, full: tuple[int, ...]) -> Tensor:
    shape = tuple(n if draw(st.booleans()) else 1 for n in full)
    while shape and shape[0] == 1 and draw(st.booleans()):
        shape = shape[1:]
    kind = draw(st.sampled_from(["boolean", "floating", "floating, some -inf", "floating, wider"]))
    if kind == "boolean":
        bias = torch.rand(shape) < 0.7
    else:
        bias = torch.randn(shape).to(torch.float32 if kind == "floating, wider" and dtype != torch.float64 else dtype)
        if kind == "floating, some -inf":
            bias = bias.masked_fill(torch.rand(shape) < 0.3, -torch.inf)
    return lay_out(bias, draw(st.sampled_from(LAYOUTS))) if bias.ndim else bias


def _boundaries(lengths: list[int], dtype: torch.dtype) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)
