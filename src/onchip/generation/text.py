"""Bytes that arrive a few at a time, as text that can be shown at once."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Decodes UTF-8 as it comes and ends before the first of `stop` that is complete.

    What may yet change is held back: the bytes of an unfinished character, and text that a stop string may begin with.
    Bytes that are not UTF-8 become U+FFFD.

    >>> text = TextStream(stop=["\\n\\n"])
    >>> [text.push(data) for data in (b"caf\\xc3", b"\\xa9\\n", b"!\\n", b"\\nmore")], text.stopped
    (['caf', 'é', '\\n!', ''], True)
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, data: bytes, final: bool = False) -> str:
        """The text that `data` makes certain; with `final` all that was held back."""
        text = self._held + self._decoder.decode(data, final)
        ends = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return text[: min(ends)[1]]
        held = 0 if final else self._possible_stop(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _possible_stop(self, text: str) -> int:
        """The length of the longest end of `text` that a stop string begins with."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)
