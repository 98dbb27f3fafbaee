"""How far a result may be from the exact one: plain eager attention, and what it and a few roundings allow."""

from typing import Any

import torch
from torch import Tensor

from onchip import BlockMask
from onchip.ops.attention import checks, reference

from .support import Case, differentiate, floating, run


def assert_exact(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Agreement in float64, where every difference but rounding is a mistake."""
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """The same bits."""
    for name in want:
        assert torch.equal(got[name], want[name]), f"{name} differs by {(got[name] - want[name]).abs().max():.3e}"


def assert_twice_eager(case: Case, backend: str) -> None:
    """An error, against the reference in float64, of at most twice that of eager PyTorch in the same dtype.

    On top come one rounding to that dtype and four of the arithmetic's, float32, of the terms that the result sums:
    where eager happens to be exact, as with a single key, twice its error is nothing.
    """
    assert_as_good_as_eager(case, run(case, backend))


def assert_as_good_as_eager(case: Case, got: dict[str, Tensor]) -> None:
    """The same of results that are at hand."""
    plain, wide = differentiate(case, eager), case.to(torch.float64)
    exact, rounding, growing = run(wide, "reference"), _terms(wide), _terms(wide, grown=True)
    for name in got:
        want = exact[name]
        dtype = torch.float32 if name == "lse" else case["q"].dtype
        seen = want != -torch.inf
        assert torch.equal(got[name] != -torch.inf, seen), f"{name}: -inf at other rows than the reference"
        if want.numel() == 0:
            continue
        error, eagers = (torch.where(seen, (x[name].double() - want).abs(), 0.0) for x in (got, plain))
        slack = torch.finfo(dtype).eps * rounding[name] + 4 * torch.finfo(torch.float32).eps * growing[name]
        excess = (error - 2 * eagers.max() - slack).max()
        assert excess <= 0, f"{name}: error {error.max():.3e}, eager's {eagers.max():.3e}, {excess:.3e} too much"


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Any = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    block_mask: BlockMask | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention as one writes it in a few lines of PyTorch: every step in q's dtype."""
    dtype, group = q.dtype, q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = torch.einsum("bihd,bjhd->bhij", q * (q.shape[-1] ** -0.5 if scale is None else scale), k)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    ahead = _ahead(q, k)
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(dtype).expand(q.shape[0], -1)[:, :, None, None] * ahead.abs().to(dtype)
    left, right = checks.reach(causal, window)
    hidden = ((ahead < -left) & (left >= 0)) | ((ahead > right) & (right >= 0))
    if block_mask is not None:
        hidden = hidden | ~block_mask.to_dense()
    if bias is not None and bias.dtype == torch.bool:
        hidden = hidden | ~bias
    elif bias is not None:
        s = s + bias.to(dtype)
    s = s.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.to(dtype)[:, None, None].expand(*s.shape[:3], 1)], -1)
    empty = (s == -torch.inf).all(-1)
    s = s.masked_fill(empty[..., None], 0.0)
    p = torch.softmax(s, -1).masked_fill(empty[..., None], 0.0)[..., : k.shape[1]]
    p = p * reference.Dropout(dropout_p, seed).kept(p.shape) / (1 - dropout_p)
    lse = torch.logsumexp(s, -1) if s.shape[-1] else s.sum(-1)
    return torch.einsum("bhij,bjhd->bihd", p, v), lse.masked_fill(empty, -torch.inf)


def _ahead(q: Tensor, k: Tensor) -> Tensor:
    """(Tq, Tk): how far key j is ahead of the key that query i sits on."""
    return torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])


def _terms(case: Case, *, grown: bool = False) -> dict[str, Tensor]:
    """Per result, the sum of the magnitudes of the terms that it sums.

    `grown`: each probability times 1 + the largest sum of magnitudes among its row's logits, which is how much a
    rounding error of the logits, or of lse, grows in the exponential.
    """
    q, k, v = (case[name].abs() for name in "qkv")
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scale = q.shape[-1] ** -0.5 if case["scale"] is None else abs(case["scale"])
    p, sink_p, lse = _probabilities(case)
    if grown:
        growth = 1 + _logit_magnitudes(case, scale * torch.einsum("bihd,bjhd->bhij", q, k), p)
        p, sink_p, lse = p * growth[..., None], sink_p * growth, growth
    grad = case.grad_out.abs()
    dropout_p = case["dropout_p"] or 0.0
    kept = reference.Dropout(dropout_p, case["seed"] or 0).kept(p.shape) / (1 - dropout_p)
    out = torch.einsum("bhij,bjhd->bihd", p * kept, v)
    delta = (grad * out).sum(-1).transpose(1, 2) + case.grad_lse.abs()
    ds = p * (torch.einsum("bihd,bjhd->bhij", grad, v) * kept + delta[..., None])
    terms = {
        "out": out,
        "lse": lse,
        "q": scale * torch.einsum("bhij,bjhd->bihd", ds, k),
        "k": scale * torch.einsum("bhij,bihd->bjhd", ds, q).unflatten(2, (-1, group)).sum(3),
        "v": torch.einsum("bhij,bihd->bjhd", p * kept, grad).unflatten(2, (-1, group)).sum(3),
        "sinks": (sink_p * delta).sum((0, 2)),
    }
    if case["alibi_slopes"] is not None:
        terms["alibi_slopes"] = (ds * _ahead(q, k).abs()).sum((2, 3)).sum_to_size(case["alibi_slopes"].shape)
    if case["bias"] is not None:
        terms["bias"] = ds.sum_to_size(case["bias"].shape)
    return terms


def _probabilities(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Of the keys, (B, H, Tq, Tk), and of the sink, (B, H, Tq); and the size of lse."""
    left, right = checks.reach(bool(case["causal"]), case["window"])
    settings = {name: case[name] for name in ("scale", "bias", "alibi_slopes", "sinks")}
    settings["visible"] = None if case["block_mask"] is None else case["block_mask"].to_dense()
    p, lse = reference.attention_matrix(
        case["q"], case["k"], left=left, right=right, softcap=case["softcap"] or 0.0, **settings
    )
    empty = lse == -torch.inf
    sinks = case["sinks"]
    sink_p = torch.zeros_like(lse) if sinks is None else (sinks[:, None] - lse).exp().masked_fill(empty, 0.0)
    return p, sink_p, lse.abs().masked_fill(empty, 0.0)


def _logit_magnitudes(case: Case, products: Tensor, p: Tensor) -> Tensor:
    """(B, H, Tq): the largest sum of magnitudes among the logits of a row, the sink's included."""
    if case["alibi_slopes"] is not None:
        slopes = case["alibi_slopes"].abs().expand(products.shape[0], -1)
        products = products + slopes[:, :, None, None] * _ahead(case["q"], case["k"]).abs()
    if floating(case["bias"]):
        products = products + case["bias"].abs()
    sinks = torch.zeros(p.shape[1], dtype=p.dtype) if case["sinks"] is None else case["sinks"].abs()
    row = torch.where(p > 0, products, 0.0).amax(-1) if p.shape[-1] else torch.zeros_like(p.sum(-1))
    return torch.maximum(row, sinks[:, None])
