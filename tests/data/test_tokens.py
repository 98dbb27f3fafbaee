"""Bytes are tokens."""

from hypothesis import given
from hypothesis import strategies as st

from onchip.data import ByteTokenizer


@given(st.binary())
def test_decoding_returns_the_bytes_and_drops_boundaries(data: bytes) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(data)
    assert tokens == list(data)
    assert tokenizer.decode([256, *tokens, 256]) == data


@given(st.text())
def test_a_string_is_its_utf8(text: str) -> None:
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)).decode() == text
