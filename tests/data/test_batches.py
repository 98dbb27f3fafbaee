"""The stream of tokens, and how it is cut."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onchip.data import Batch, Batches, ByteTokenizer, Document, consecutive, token_stream

BOUNDARY = ByteTokenizer.boundary_id
texts = st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=12)


def stream_of(texts: list[bytes]) -> np.ndarray:
    return token_stream([Document(str(i), text) for i, text in enumerate(texts)])


def distinct(length: int) -> np.ndarray:
    """A stream in which every token occurs once, so that a token tells where it stood."""
    return np.arange(1000, 1000 + length, dtype=np.uint16)


def check(batch: Batch, context: int) -> None:
    """What holds for every batch."""
    cu = batch.cu_seqlens
    assert (batch.tokens.dtype, batch.targets.dtype, cu.dtype) == (torch.int64, torch.int64, torch.int32)
    assert cu[0] == 0 and cu[-1] == len(batch.tokens) == len(batch.targets)
    assert cu.diff().min() >= 1 and cu.diff().max() <= context
    # A sequence goes on, token by token, to its end; a boundary begins one, and stands nowhere else.
    starts = torch.zeros(len(batch.tokens), dtype=torch.bool)
    starts[cu[:-1].long()] = True
    assert (starts | (batch.tokens != BOUNDARY)).all()
    within = ~starts[1:]
    assert (batch.tokens[1:][within] == batch.targets[:-1][within]).all()


@given(texts)
def test_the_stream_is_every_document_after_a_boundary(texts: list[bytes]) -> None:
    stream = stream_of(texts)
    assert stream.dtype == np.uint16
    expected = [token for text in texts for token in (BOUNDARY, *text)]
    assert stream.tolist() == expected


@given(texts, st.integers(1, 20), st.integers(1, 5), st.integers(1, 9))
def test_consecutive_windows_make_every_token_a_target_once(
    texts: list[bytes], context: int, batch: int, windows: int
) -> None:
    stream = stream_of(texts)
    batches = list(consecutive(stream, batch, context))
    for each in batches:
        check(each, context)
        assert len(each.tokens) <= batch * context
    assert torch.cat([each.tokens for each in batches]).tolist() == stream.tolist()
    assert torch.cat([each.targets for each in batches]).tolist() == np.roll(stream, -1).tolist()
    some = sum(len(each.tokens) for each in consecutive(stream, batch, context, windows))
    assert some <= windows * context
    assert some == len(stream) or some > (windows - 1) * context


@given(texts, st.integers(1, 12), st.integers(1, 4), st.integers(0, 3), st.integers(0, 30))
def test_a_batch_is_full_and_ends_documents_with_a_boundary(
    texts: list[bytes], context: int, batch: int, seed: int, step: int
) -> None:
    stream = stream_of([*texts, b"x" * context])
    each = Batches(stream, batch, context, seed)[step]
    check(each, context)
    assert len(each.tokens) == batch * context
    pairs = set(zip(stream.tolist(), np.roll(stream, -1).tolist(), strict=True))
    assert set(zip(each.tokens.tolist(), each.targets.tolist(), strict=True)) <= pairs


@given(st.integers(5, 60), st.integers(1, 4), st.integers(0, 5))
def test_an_epoch_takes_every_window_once_and_leaves_less_than_one(length: int, context: int, seed: int) -> None:
    stream = distinct(length)
    batches = Batches(stream, 1, context, seed)
    windows = length // context
    for epoch in range(3):
        seen = torch.cat([batches[epoch * windows + i].tokens for i in range(windows)])
        assert len(set(seen.tolist())) == windows * context > length - context


def test_the_order_is_a_function_of_seed_and_step() -> None:
    stream = distinct(1000)

    def tokens(batches: Batches, step: int) -> list[int]:
        return batches[step].tokens.tolist()

    one, other = Batches(stream, 4, 16, seed=1), Batches(stream, 4, 16, seed=1)
    steps = range(40)  # two epochs and a half
    forward = [tokens(one, step) for step in steps]
    assert [tokens(other, step) for step in reversed(steps)] == forward[::-1]
    assert forward[0] != forward[16]
    assert tokens(Batches(stream, 4, 16, seed=2), 0) != forward[0]


def test_the_parts_of_a_batch_make_it_up() -> None:
    batches = Batches(distinct(1000), batch=6, context=8, seed=0)
    parts = [batches.part(3, index, 3) for index in range(3)]
    assert torch.cat([part.tokens for part in parts]).equal(batches[3].tokens)
    assert torch.cat([part.targets for part in parts]).equal(batches[3].targets)


def test_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window of 8 tokens .* found 8"):
        Batches(distinct(8), batch=1, context=8, seed=0)
    assert len(Batches(distinct(9), batch=1, context=8, seed=0)[0].tokens) == 8
