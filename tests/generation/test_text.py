from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from onchip.generation.text import TextStream


def pushed(stream, pieces):
    texts = []
    for i, piece in enumerate(pieces):
        texts.append(stream.push(piece, final=i == len(pieces) - 1))
        if stream.stopped:
            break
    return texts


@given(st.binary(max_size=40), st.lists(st.integers(0, 40), max_size=8))
def test_any_bytes_in_any_pieces_decode_as_one(data, cuts):
    cuts = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in pairwise(cuts)]
    assert "".join(pushed(TextStream(), pieces)) == data.decode("utf-8", "replace")


@given(st.text("abé", max_size=30), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_stop_string_that_completes_first(text, stop):
    """Byte by byte: what is shown never has to be taken back."""
    data = text.encode()
    stream = TextStream(stop)
    shown = "".join(pushed(stream, [data[i : i + 1] for i in range(len(data))] or [b""]))
    expected = text
    for end in range(len(text) + 1):
        matches = [s for s in stop if text[:end].endswith(s)]
        if matches:
            expected = text[: end - max(map(len, matches))]
            break
    assert shown == expected
    assert stream.stopped == any(s in text for s in stop)


def test_no_more_than_a_possible_stop_string_is_held_back():
    stream = TextStream(["END"])
    assert [stream.push(c.encode()) for c in "aEENxEN"] == ["a", "", "E", "", "ENx", "", ""]
    assert stream.push(b"", final=True) == "EN"
