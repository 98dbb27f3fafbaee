"""What the tests of attention share: calls with gradients of their outputs, strides of every kind, and running them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import onchip

LOW = (torch.float32, torch.bfloat16, torch.float16)
DIFFERENTIABLE = ("q", "k", "v", "bias", "alibi_slopes", "sinks")
LAYOUTS = ("contiguous", "heads first", "dim outermost", "every other", "inside a larger tensor", "one head for all")


@dataclass(frozen=True, repr=False)
class Case:
    """A call to `onchip.attention_with_lse`, the backend left out, and the gradients of its outputs."""

    arguments: dict[str, Any]
    grad_out: Tensor
    grad_lse: Tensor

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def __repr__(self) -> str:
        show = lambda x: f"{x.dtype} {tuple(x.shape)} {x.stride()}" if isinstance(x, Tensor) else repr(x)  # noqa: E731
        return "Case(" + ", ".join(f"{name}: {show(x)}" for name, x in self.arguments.items()) + ")"

    def to(self, dtype: torch.dtype) -> "Case":
        """The same values, as far as `dtype` holds them."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        cast = {n: x.to(dtype) if n in DIFFERENTIABLE and floating(x) else x for n, x in self.arguments.items()}
        return replace(self, arguments=cast, grad_out=self.grad_out.to(dtype), grad_lse=self.grad_lse.to(wide))

    def on(self, device: str) -> "Case":
        """The same call on another device, with the same strides."""
        moved = {n: _moved(x, device) if isinstance(x, Tensor) else x for n, x in self.arguments.items()}
        if self["block_mask"] is not None:
            moved["block_mask"] = self["block_mask"].to(device)
        return Case(moved, _moved(self.grad_out, device), _moved(self.grad_lse, device))

    def times(self, factor: float) -> "Case":
        """q, k and v multiplied by `factor`."""
        return replace(self, arguments=self.arguments | {n: self[n] * factor for n in "qkv"})


def case(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Case:
    """A call with random gradients for its outputs."""
    batch = q.shape[:1] if q.ndim == 4 else ()
    out = torch.randn(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    lse = torch.randn(*batch, q.shape[-2], q.shape[-3], dtype=_lse_dtype(q.dtype))
    return Case({"q": q, "k": k, "v": v} | more, out, lse)


def randn_case(
    *shape: int,
    kv_heads: int | None = None,
    dim: int = 8,
    value_dim: int | None = None,
    dtype=torch.float64,
    **more: Any,
) -> Case:
    """A call on normal inputs of shape (batch, Tq, Tk, heads), or packed (total_q, total_k, heads)."""
    *batch, tq, tk, heads = shape
    kv_heads, value_dim = kv_heads or heads, value_dim or dim
    q, k, v = (
        torch.randn(*batch, *rest, dtype=dtype)
        for rest in ((tq, heads, dim), (tk, kv_heads, dim), (tk, kv_heads, value_dim))
    )
    return case(q, k, v, **more)


def lay_out(x: Tensor, how: str) -> Tensor:
    """`x` with other strides, in storage that is NaN (True, for booleans) wherever x has no element.

    "one head for all" changes the values: every entry of the last dimension but one becomes the first, at stride 0.
    """
    if how == "heads first":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2) if x.ndim >= 3 else x
    if how == "dim outermost":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if how == "every other":
        storage = _poisoned(x, (*x.shape[:-1], 2 * x.shape[-1]))
        storage[..., ::2] = x
        return storage[..., ::2]
    if how == "inside a larger tensor":
        storage = _poisoned(x, tuple(n + 3 for n in x.shape))
        inside = storage[tuple(slice(1, n + 1) for n in x.shape)]
        return inside.copy_(x)
    if how == "one head for all" and x.ndim >= 2 and x.shape[-2] > 0:
        return x[..., :1, :].expand(x.shape)
    return x.contiguous()


def run(case: Case, backend: str) -> dict[str, Tensor]:
    """`out`, `lse` and, by the name of the input, the gradients; Triton's from a GPU where there is one."""
    on_gpu = backend == "triton" and torch.cuda.is_available()
    results = differentiate(
        case.on("cuda") if on_gpu else case,
        lambda **arguments: onchip.attention_with_lse(**arguments, backend=backend),
    )
    return {name: x.cpu() for name, x in results.items()} if on_gpu else results


def differentiate(case: Case, attention: Any) -> dict[str, Tensor]:
    """`run` for any function that takes `onchip.attention_with_lse`'s arguments."""
    leaves = {n: case[n].detach().requires_grad_() for n in DIFFERENTIABLE if floating(case[n])}
    out, lse = attention(**(case.arguments | leaves))
    weights = (case.grad_out, case.grad_lse.to(lse.dtype))
    grads = torch.autograd.grad((out, lse), tuple(leaves.values()), weights, materialize_grads=True)
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(leaves, grads, strict=True))


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Run with n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _moved(x: Tensor, device: str) -> Tensor:
    """`x` with its strides, and with what its storage holds besides."""
    elements = x.untyped_storage().nbytes() // x.itemsize
    return x.detach().as_strided((elements,), (1,), 0).to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def _poisoned(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.full(shape, True if x.dtype == torch.bool else torch.nan, dtype=x.dtype)


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
