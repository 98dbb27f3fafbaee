"""Attention's tile shapes timed on the GPU at hand: from each entry of `blocks`, step by step to a faster neighbour."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from triton.errors import TritonError

from onchip.bench.timing import Candidate, interleave
from onchip.ops import _triton
from onchip.ops._triton import Launch
from onchip.ops.attention.triton import launches
from onchip.ops.attention.triton.blocks import Blocks, Pass

GAIN = 0.02  # a step must save this share of the time: less is within what two measurements differ by
SMALLEST = 16  # rows and keys: a tile of the matrix units
TOKENS, LENGTH, WIDTH = 16384, 4096, 2048  # queries in all and of a sequence; heads × head dim
DECODED = 65536  # keys that one query sees

Timer = Callable[[Blocks], float | None]


def neighbours(of: Blocks) -> Iterator[Blocks]:
    """The shapes one step away: rows and keys halved and doubled, 4 and 8 warps, a stage more and less."""
    steps = {
        "rows": (of.rows // 2, of.rows * 2),
        "keys": (of.keys // 2, of.keys * 2),
        "warps": (4, 8),
        "stages": (of.stages - 1, of.stages + 1),
    }
    for name, values in steps.items():
        least = SMALLEST if name in ("rows", "keys") else 1
        yield from (of._replace(**{name: n}) for n in values if n >= least and n != getattr(of, name))


def descend(start: Blocks, seconds: Timer) -> tuple[Blocks, float]:
    """The shape that no neighbour beats by `GAIN`, reached from `start` by its best neighbours, and its time.

    `seconds` times a shape, or says None where it does not compile or does not fit. Each is timed once.

    Raises:
        ValueError: `start` itself does not run.
    """
    times = {start: seconds(start)}
    best, least = start, times[start]
    if least is None:
        raise ValueError(f"{start}, which the table has now, does not run here")
    while True:
        times |= {shape: seconds(shape) for shape in neighbours(best) if shape not in times}
        found = [(time, shape) for shape in neighbours(best) if (time := times[shape]) is not None]
        if not found or min(found)[0] > (1 - GAIN) * least:
            return best, least
        least, best = min(found)


class Entry(NamedTuple):
    """An entry of the tables: a pass, a head dim, and whether in float32 or in 16 bits."""

    of: Pass
    head_dim: int
    float32: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of what is timed."""
        return torch.float32 if self.float32 else torch.bfloat16

    def start(self, device: torch.device) -> Blocks:
        """What the table has now."""
        return call_of(self, device).blocks(self.of)

    def __str__(self) -> str:
        return f"{self.of}, head dim {self.head_dim}"

    def timer(self, device: torch.device, announce: Callable[[str], object]) -> Timer:
        """Times a shape on the pass of this entry, having announced it."""
        made = launches_of(self, device)

        def seconds(shape: Blocks) -> float | None:
            announce(f"{self}: {shape}")
            try:
                run = [launch.run for launch in made(shape)]
                candidate = Candidate(lambda: [launch() for launch in run])
                return statistics.median(interleave({"": candidate}, device, seconds=0.1, min_rounds=5)[""])
            except (TritonError, RuntimeError):  # the second is what a compiler's later passes raise
                return None

        return seconds


def launches_of(entry: Entry, device: torch.device) -> Callable[[Blocks], list[Launch]]:
    """What makes the launches of an entry's pass with a shape of one's own."""
    call = call_of(entry, device)

    def shaped(shape: Blocks) -> _Shaped:
        return _Shaped(**{field.name: getattr(call, field.name) for field in fields(call)}, shape=shape)

    out, lse = torch.empty_like(call.q), torch.zeros(call.batch, call.heads, call.q.shape[1], device=device)
    if entry.of in ("forward", "decode"):
        return lambda shape: launches.attend(shaped(shape), out, lse)
    saved = launches.Saved(torch.randn_like(out), lse, torch.zeros_like(lse))
    if entry.of == "keys":
        grad_k, grad_v = torch.empty_like(call.k), torch.empty_like(call.v)
        return lambda shape: [launches.keys_and_values(shaped(shape), saved, grad_k, grad_v)]
    if entry.of == "queries":
        return lambda shape: [launches.queries(shaped(shape), saved, out, None)]
    grad = torch.empty(1, call.heads, *call.longest, device=device)
    return lambda shape: [launches.bias(shaped(shape), saved, grad, per_query=True, per_key=True)]


@dataclass(frozen=True, kw_only=True)
class _Shaped(launches.Call):
    """A call whose tiles have this shape and not the table's."""

    shape: Blocks

    def blocks(self, of: Pass) -> Blocks:
        return self.shape


def call_of(entry: Entry, device: torch.device) -> launches.Call:
    """Causal training over `TOKENS`; decoding with 32 heads on 8; where it is asked for, a bias of all pairs."""
    dtype, dim = entry.dtype, entry.head_dim
    queries = keys = (TOKENS // LENGTH, LENGTH, WIDTH // dim, dim)
    if entry.of == "decode":
        queries, keys = (1, 1, 32, dim), (1, DECODED, 8, dim)
    q, k, v = (torch.randn(shape, device=device).to(dtype) for shape in (queries, keys, keys))
    lengths = q.shape[1], k.shape[1]
    bias = torch.zeros(1, q.shape[2], *lengths, device=device, dtype=dtype) if entry.of == "bias" else None
    architecture = _triton.architecture(device)
    return launches.Call(q, k, v, -1, 0, dim**-0.5, 0.0, bias, None, None, None, None, lengths, architecture)


def table(found: Mapping[Entry, Blocks]) -> str:
    """The entries as `blocks.py` has them, a line for each pass.

    >>> print(table({Entry("forward", 64): Blocks(128, 64, 8, 3), Entry("forward", 128): Blocks(128, 64, 8, 2)}))
        "forward": (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2)),
    """
    lines: dict[str, list[str]] = {}
    for entry, shape in found.items():
        lines.setdefault(entry.of, []).append(f"Blocks({', '.join(map(str, shape))})")
    return "\n".join(f'    "{of}": ({", ".join(shapes)}),' for of, shapes in lines.items())
