"""Text as bytes: the 257-symbol vocabulary of a byte-level language model."""

from __future__ import annotations

from collections.abc import Iterable


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

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; boundaries stand for none."""
        return bytes(i for i in ids if i != self.boundary_id)
