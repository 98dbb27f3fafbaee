"""Caches whose rows hold known keys, NaN wherever no key is, and what attention over them must give."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import onchip

from ..attention.support import Case, case
from ..attention.tolerance import assert_as_good_as_eager, assert_exact

SHARED = ("causal", "window", "scale", "softcap", "sinks")  # settings that are the same for all rows


@dataclass(frozen=True, repr=False)
class Cached:
    """A call to `onchip.attention_with_cache_and_lse`, less the backend, and what each row holds after it."""

    arguments: dict[str, Any]
    keys: list[Tensor]
    values: list[Tensor]

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def cases(self) -> list[Case]:
        """Plain attention of each row over all its keys."""
        rows = []
        for b, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            more = {n: self[n] for n in SHARED if self[n] is not None} | {"causal": self.arguments.get("causal", True)}
            slopes = self["alibi_slopes"]
            if slopes is not None:
                more["alibi_slopes"] = slopes if slopes.ndim == 1 else slopes[b]
            rows.append(case(self["q"][b : b + 1], keys[None], values[None], **more))
        return rows


def cached(
    lengths: list[int],
    tq: int,
    *,
    added: int | None = None,
    page_size: int | None = None,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    integers: torch.dtype = torch.int32,
    starts: list[int] | None = None,
    **more: Any,
) -> Cached:
    """Rows that hold `lengths` keys, then `added` more (by default tq; 0 for none), against tq queries.

    With a page size, pages are in random order, some are nobody's, and the table holds nonsense beyond a row's keys.
    """
    added = tq if added is None else added
    batch, ends = len(lengths), [n + added for n in lengths]
    firsts = [0] * batch if starts is None else starts
    new = lambda n, heads, dim: torch.randn(n, heads, dim, dtype=torch.float64).to(dtype)  # noqa: E731
    keys, values = ([new(n, heads[1], dim) for n in ends] for dim in dims)
    arguments: dict[str, Any] = {"q": new(batch * tq, heads[0], dims[0]).view(batch, tq, heads[0], dims[0]), **more}
    size, table = max(ends, default=0) + 3, None
    if page_size is not None:
        size, table = page_size, _page_table(ends, page_size)
    pages = batch if table is None else int(table.numel()) + 2
    caches = [torch.full((pages, size, heads[1], dim), torch.nan, dtype=dtype) for dim in dims]
    for b in range(batch):
        for n in range(firsts[b], lengths[b]):
            for cache, rows in zip(caches, (keys, values), strict=True):
                cache[slot(table, b, n, size)] = rows[b][n]
    arguments |= {"k_cache": caches[0], "v_cache": caches[1], "cache_seqlens": torch.tensor(lengths, dtype=integers)}
    if table is not None:
        used = torch.arange(table.shape[1]) < torch.tensor([-(-n // page_size) for n in ends])[:, None]
        arguments["block_table"] = torch.where(used, table, torch.tensor([-1, 1 << 30])[torch.rand(()).gt(0.5).int()])
        arguments["block_table"] = arguments["block_table"].int()
    if starts is not None:
        arguments["cache_leftpad"] = torch.tensor(starts, dtype=integers)
    if added:
        for name, rows, dim in zip("kv", (keys, values), dims, strict=True):
            tails = torch.cat([torch.empty(0, heads[1], dim, dtype=dtype), *(x[-added:] for x in rows)])
            arguments[name] = tails.view(batch, added, heads[1], dim)
    keys, values = ([x[first:] for x, first in zip(rows, firsts, strict=True)] for rows in (keys, values))
    return Cached(arguments, keys, values)


def run(call: Cached, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`out`, `lse` and the two caches after the call; Triton's from a GPU where there is one."""
    on_gpu = backend == "triton" and torch.cuda.is_available()
    move = lambda x: x.cuda() if on_gpu and isinstance(x, Tensor) else x  # noqa: E731
    arguments = {n: tuple(map(move, x)) if n == "rotary" else move(x) for n, x in call.arguments.items()}
    for name in ("k_cache", "v_cache"):
        if not on_gpu:
            arguments[name] = _copy(arguments[name])
    results = onchip.attention_with_cache_and_lse(**arguments, backend=backend)
    return tuple(x.cpu() for x in (*results, arguments["k_cache"], arguments["v_cache"]))  # type: ignore[return-value]


def check(call: Cached, backend: str) -> None:
    """Each row is attention over all its keys; the cache holds the keys, and nothing else was written."""
    out, lse, k_cache, v_cache = run(call, backend)
    for b, row in enumerate(call.cases()):
        got = {"out": out[b : b + 1], "lse": lse[b : b + 1]}
        if out.dtype == torch.float64:
            exact = onchip.attention_with_lse(**row.arguments, backend="reference")
            assert_exact(got, dict(zip(got, exact, strict=True)))
        else:
            assert_as_good_as_eager(row, got)
    check_cache(call, k_cache, v_cache)


def check_cache(call: Cached, k_cache: Tensor, v_cache: Tensor) -> None:
    """The rows' keys and values are where they belong, and NaN is where it was."""
    firsts = [0] * len(call.keys) if call["cache_leftpad"] is None else call["cache_leftpad"].tolist()
    for cache, before, rows in ((k_cache, call["k_cache"], call.keys), (v_cache, call["v_cache"], call.values)):
        want = before.clone()
        for b, (first, row) in enumerate(zip(firsts, rows, strict=True)):
            for n, x in enumerate(row):
                want[slot(call["block_table"], b, first + n, cache.shape[1])] = x
        torch.testing.assert_close(cache, want, rtol=0, atol=0, equal_nan=True)


def _copy(x: Tensor) -> Tensor:
    """With the same strides, whatever they are."""
    storage = torch.empty(x.untyped_storage().nbytes() // x.itemsize, dtype=x.dtype)
    storage.copy_(torch.as_strided(x, storage.shape, (1,), 0))
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def slot(table: Tensor | None, b: int, n: int, size: int) -> tuple[int, int]:
    """Where key n of row b is."""
    return (b, n) if table is None else (int(table[b, n // size]), n % size)


def _page_table(ends: list[int], page_size: int) -> Tensor:
    columns = max((-(-n // page_size) for n in ends), default=0) + 2
    return torch.randperm(len(ends) * columns + 2)[: len(ends) * columns].view(len(ends), columns).int()
