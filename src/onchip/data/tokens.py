"""What a tokenizer is, and the one of bytes: the 257-symbol vocabulary of a byte-level language model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Tokenizer(Protocol):
    """Text as token ids below `vocab_size`; `boundary_id` stands at the start of each document of a training text."""

    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def boundary_id(self) -> int: ...  # noqa: D102
    def encode(self, text: str | bytes) -> list[int]:
        """The tokens of `text`; none is added."""
        ...

    def begin(self, text: str | bytes) -> list[int]:
        """The tokens of a document that begins with `text`, at least one."""
        ...

    def ends(self, token: int) -> bool:
        """Whether `token` ends a document."""
        ...

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for."""
        ...


class ByteTokenizer:
    """Every byte is a token; one more, `boundary_id`, stands at the start of each document.

    Any bytes are valid text: encoding never fails, decoding loses nothing. Predicting the boundary ends a document.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("né")
    [110, 195, 169]
    >>> tokenizer.decode([256, 110, 195, 169, 256])
    b'n\\xc3\\xa9'
    """

    vocab_size = 257
    boundary_id = 256

    def encode(self, text: str | bytes) -> list[int]:
        """The bytes of `text` (a string as UTF-8) as token ids in [0, 256); no boundary is added."""
        return list(text.encode() if isinstance(text, str) else text)

    def begin(self, text: str | bytes) -> list[int]:
        """The boundary, then the bytes of `text`."""
        return [self.boundary_id, *self.encode(text)]

    def ends(self, token: int) -> bool:
        """Whether `token` is the boundary."""
        return token == self.boundary_id

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; boundaries stand for none."""
        return bytes(i for i in ids if i != self.boundary_id)
