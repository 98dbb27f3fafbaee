"""Documents to batches: one stream of tokens, cut into windows in a seeded order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from onchip.data.corpus import Document
from onchip.data.tokens import ByteTokenizer

Stream = NDArray[np.uint16]


class Batch(NamedTuple):
    """Packed sequences: nothing may look across the borders that `cu_seqlens` sets.

    `tokens` and `targets` are `(total,)` int64, `targets[i]` the token that follows `tokens[i]`; `cu_seqlens` is
    `(sequences + 1,)` int32, from 0 to total.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def token_stream(documents: Sequence[Document]) -> Stream:
    """All documents one after the other, a boundary before each: `(total,)` uint16.

    The stream is a ring: after its last token comes its first, the boundary that ends the last document as each other
    boundary ends the document before it.

    >>> token_stream([Document("a", b"hi"), Document("b", b"!")])
    array([256, 104, 105, 256,  33], dtype=uint16)
    """
    stream = np.empty(sum(len(document.data) + 1 for document in documents), np.uint16)
    start = 0
    for document in documents:
        end = start + 1 + len(document.data)
        stream[start] = ByteTokenizer.boundary_id
        stream[start + 1 : end] = np.frombuffer(document.data, np.uint8)
        start = end
    return stream


class Batches:
    """The batches of a training run: `batches[step]` holds `batch` windows of `context` tokens.

    An epoch cuts the ring, from a random offset on, into windows side by side and deals them out in a random order;
    what is left over, less than a window, falls elsewhere in the next epoch. The windows of a step are a function of
    (seed, step) alone, so a resumed run goes on with exactly the tokens that would have come. A step costs one gather
    and, once an epoch, one permutation of the windows.

    Raises `ValueError` where the stream is shorter than one window and the token that follows it.

    >>> batches = Batches(token_stream([Document("a", b"to be"), Document("b", b"or not")]), batch=2, context=4, seed=0)
    >>> batches[7].tokens.shape, batches[7].cu_seqlens[-1].item()
    (torch.Size([8]), 8)
    """

    def __init__(self, stream: Stream, batch: int, context: int, seed: int) -> None:
        if len(stream) <= context:
            raise ValueError(
                f"corpus: expected more than one window of {context} tokens to learn from, and found {len(stream)}: "
                "give more text or a smaller context"
            )
        self.stream, self.batch, self.context, self.seed = stream, batch, context, seed
        self._windows = len(stream) // context
        self._epoch = -1

    def __getitem__(self, step: int) -> Batch:
        return self.part(step, 0, 1)

    def part(self, step: int, index: int, parts: int) -> Batch:
        """The windows of `step` that fall to one of `parts` equal shares of the batch."""
        rows = self.batch // parts
        first = step * self.batch + index * rows
        starts = np.array([self._start(window) for window in range(first, first + rows)])
        positions = starts[:, None] + np.arange(self.context + 1)
        window = self.stream.take(positions, mode="wrap")
        return _pack(window[:, :-1].ravel(), window[:, 1:].ravel(), self.context)

    def _start(self, window: int) -> int:
        epoch, index = divmod(window, self._windows)
        if epoch != self._epoch:
            random = np.random.default_rng([self.seed, epoch])
            self._offset = int(random.integers(len(self.stream)))
            self._order = random.permutation(self._windows)
            self._epoch = epoch
        return self._offset + int(self._order[index]) * self.context


def consecutive(stream: Stream, batch: int, context: int, windows: int | None = None) -> Iterator[Batch]:
    """The windows of `stream` side by side, `batch` at a time, every token a target once; the last may be shorter.

    `windows` takes only that many of them, evenly spread.

    >>> [batch.tokens.tolist() for batch in consecutive(token_stream([Document("a", b"abcd")]), batch=1, context=3)]
    [[256, 97, 98], [99, 100]]
    """
    starts = np.arange(0, len(stream), context)
    if windows is not None and windows < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, windows).round().astype(np.int64)]
    for first in range(0, len(starts), batch):
        positions = (starts[first : first + batch, None] + np.arange(context)).ravel()
        positions = positions[positions < len(stream)]
        yield _pack(stream[positions], stream.take(positions + 1, mode="wrap"), context)


def _pack(tokens: Stream, targets: Stream, context: int) -> Batch:
    borders = np.union1d(np.flatnonzero(tokens == ByteTokenizer.boundary_id), np.arange(0, len(tokens), context))
    return Batch(
        torch.from_numpy(tokens.astype(np.int64)),
        torch.from_numpy(targets.astype(np.int64)),
        torch.from_numpy(np.append(borders, len(tokens)).astype(np.int32)),
    )
