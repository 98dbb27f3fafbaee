"""Values that options spell as text."""

from collections.abc import Sequence
from typing import TypeVar

from onchip.cli.errors import Failure

Choice = TypeVar("Choice", bound=str)


def choices(option: str, text: str, allowed: Sequence[Choice]) -> list[Choice]:
    """Some of the words allowed, separated by commas.

    >>> choices("--fruit", "fig,plum", ["apple", "fig", "plum"])
    ['fig', 'plum']
    """
    known = {str(word): word for word in allowed}
    words = text.split(",")
    if not known.keys() >= set(words):
        raise Failure(f"{option} must be some of {', '.join(allowed)}, separated by commas, got {text!r}", exit_code=2)
    return [known[word] for word in words]


def integers(option: str, text: str, count: int | None = None) -> list[int]:
    """Positive integers, separated by commas.

    >>> integers("--lengths", "512,1024")
    [512, 1024]
    """
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1 or count not in (None, len(values)):
        wanted = "positive integers" if count is None else f"{count} positive integers"
        raise Failure(f"{option} must be {wanted} separated by commas, got {text!r}", exit_code=2)
    return values


def reach(option: str, text: str | None) -> tuple[int | None, int | None] | None:
    """How far a window reaches to the left and to the right; - is without limit.

    >>> reach("--window", "255,-")
    (255, None)
    """
    if text is None:
        return None
    words = text.split(",")
    if len(words) != 2 or not all(word == "-" or word.isdecimal() for word in words):
        raise Failure(f"{option} must be LEFT,RIGHT, each a number of keys or -, got {text!r}", exit_code=2)
    left, right = (None if word == "-" else int(word) for word in words)
    return left, right
