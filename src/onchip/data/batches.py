"""Documents to batches: one stream of tokens, cut into windows in a seeded order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray

from onchip.data.corpus import Document
from onchip.data.tokens import ByteTokenizer, Tokenizer

Stream = NDArray[np.uint16] | NDArray[np.uint32]
_BYTES = ByteTokenizer()


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


def token_stream(documents: Sequence[Document], tokenizer: Tokenizer = _BYTES) -> Stream:
    """All documents one after the other, a boundary before each: `(total,)` uint16, uint32 beyond 65,536 tokens.

    The stream is a ring: after its last token comes its first, the boundary that ends the last document as each other
    boundary ends the document before it. Raises `ValueError` naming a document that the tokenizer cannot read.

    >>> token_stream([Document("a", b"hi"), Document("b", b"!")])
    array([256, 104, 105, 256,  33], dtype=uint16)
    """
    boundary = np.array([tokenizer.boundary_id])
    parts = [part for document in documents for part in (boundary, _ids(document, tokenizer))]
    dtype: type[np.uint16 | np.uint32] = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    return cast(Stream, np.concatenate(parts, dtype=dtype, casting="unsafe"))


def _ids(document: Document, tokenizer: Tokenizer) -> NDArray[Any]:
    if isinstance(tokenizer, ByteTokenizer):
        return np.frombuffer(document.data, np.uint8)  # without a Python number for each
    try:
        return np.array(tokenizer.encode(document.data), np.int64)
    except ValueError as error:
        raise ValueError(f"{document.name}: {error}") from None


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

    def __init__(
        self, stream: Stream, batch: int, context: int, seed: int, boundary_id: int = ByteTokenizer.boundary_id
    ) -> None:
        if len(stream) <= context:
            raise ValueError(
                f"corpus: expected more than one window of {context} tokens to learn from, and found {len(stream)}: "
                "give more text or a smaller context"
            )
        self.stream, self.batch, self.context, self.seed = stream, batch, context, seed
        self.boundary_id = boundary_id
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
        return _pack(window[:, :-1].ravel(), window[:, 1:].ravel(), self.context, self.boundary_id)

    def _start(self, window: int) -> int:
        epoch, index = divmod(window, self._windows)
        if epoch != self._epoch:
            random = np.random.default_rng([self.seed, epoch])
            self._offset = int(random.integers(len(self.stream)))
            self._order = random.permutation(self._windows)
            self._epoch = epoch
        return self._offset + int(self._order[index]) * self.context


def consecutive(
    stream: Stream,
    batch: int,
    context: int,
    windows: int | None = None,
    boundary_id: int = ByteTokenizer.boundary_id,
) -> Iterator[Batch]:
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
        yield _pack(stream[positions], stream.take(positions + 1, mode="wrap"), context, boundary_id)


def _pack(tokens: Stream, targets: Stream, context: int, boundary_id: int) -> Batch:
    borders = np.union1d(np.flatnonzero(tokens == boundary_id), np.arange(0, len(tokens), context))
    return Batch(
        torch.from_numpy(tokens.astype(np.int64)),
        torch.from_numpy(targets.astype(np.int64)),
        torch.from_numpy(np.append(borders, len(tokens)).astype(np.int32)),
    )
