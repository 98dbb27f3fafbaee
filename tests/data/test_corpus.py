"""Where text comes from, and which files are held out."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onchip.data import Corpus, Document


def names(corpus: Corpus) -> list[str]:
    return sorted({document.name for document in (*corpus.train, *corpus.held_out)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two texts, and what a walk must pass by."""
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    files = {
        "b/two.txt": b"second",
        "one.md": b"first, and longer",
        ".hidden": b"no",
        ".git/config": b"no",
        "empty": b"",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_a_folder_is_walked_in_order_and_hidden_files_are_skipped(folder: Path) -> None:
    corpus = Corpus.read([folder])
    assert [(document.name, document.data) for document in corpus.train] == [("one.md", b"first, and longer")]
    assert [(document.name, document.data) for document in corpus.held_out] == [("b/two.txt", b"second")]


def test_files_globs_and_folders_are_taken_and_a_file_counts_once(folder: Path) -> None:
    assert names(Corpus.read([folder / "one.md", folder / "b" / "two.txt"])) == ["one.md", "two.txt"]
    assert names(Corpus.read([str(folder / "*")])) == ["one.md", "two.txt"]
    twice = Corpus.read([folder, folder / "one.md", str(folder / "**/*.txt")])
    assert len(twice.train) + len(twice.held_out) == 2


def test_a_name_that_looks_like_a_pattern_is_a_name_first(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_bytes(b"some text")
    assert names(Corpus.read([tmp_path / "a[1].txt"])) == ["a[1].txt"]


def test_any_bytes_are_valid_text(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    corpus = Corpus.read([tmp_path / "noise"])
    assert corpus.train[0].data + corpus.held_out[0].data == bytes(range(256))


def test_of_a_single_file_the_tail_is_held_out_and_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "book").write_bytes(b"x" * 1000)
    corpus = Corpus.read([tmp_path / "book"])
    assert [len(document.data) for document in (*corpus.train, *corpus.held_out)] == [950, 50]
    assert "the last" in str(corpus)


@given(st.dictionaries(st.text(min_size=1), st.binary(min_size=1, max_size=60), min_size=2, max_size=40), st.randoms())
def test_the_split_is_by_file_about_five_percent_and_the_same_in_any_order(texts: dict[str, bytes], random) -> None:  # type: ignore[no-untyped-def]
    documents = [Document(name, data) for name, data in texts.items()]
    corpus = Corpus.split(documents)
    assert corpus.train and corpus.held_out
    assert sorted(corpus.train + corpus.held_out, key=documents.index) == documents
    size, held_out = sum(map(len, texts.values())), sum(len(document.data) for document in corpus.held_out)
    smallest = min(map(len, texts.values()))
    assert held_out <= 0.05 * size or held_out == smallest
    # No file left behind would still have fitted.
    assert all(held_out + len(document.data) > 0.05 * size for document in corpus.train)
    random.shuffle(documents)
    assert set(Corpus.split(documents).held_out) == set(corpus.held_out)


def test_the_fingerprint_tells_corpora_apart() -> None:
    texts = {"a": b"one", "b": b"two two", "c": b"three three"}

    def fingerprint(texts: dict[str, bytes]) -> str:
        return Corpus.split([Document(name, data) for name, data in texts.items()]).fingerprint

    assert fingerprint(texts) == fingerprint(dict(texts))
    assert len({fingerprint(texts), fingerprint(texts | {"c": b"three thref"}), fingerprint(texts | {"d": b"x"})}) == 3


def test_the_default_is_the_standard_library_without_its_tests() -> None:
    corpus = Corpus.read()
    found = names(corpus)
    assert {"textwrap.py", "json/decoder.py"} <= set(found)
    assert all(name.endswith(".py") for name in found)
    assert not [name for name in found if {"test", "tests", "site-packages"} & set(name.split("/"))]
    held_out = sum(len(document.data) for document in corpus.held_out)
    total = held_out + sum(len(document.data) for document in corpus.train)
    assert 5_000_000 < total < 30_000_000
    assert 0.04 < held_out / total <= 0.05


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Corpus.read([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match=r"\*\.tex"):
        Corpus.read([tmp_path / "*.tex"])
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="dangling"):
        Corpus.read([tmp_path / "dangling"])


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for source in (tmp_path, tmp_path / "empty"):
        with pytest.raises(ValueError, match="found 0 bytes in .*" + tmp_path.name):
            Corpus.read([source])


def test_a_pipe_is_no_text_and_in_a_folder_it_is_passed_by(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(ValueError, match="neither"):
        Corpus.read([folder / "pipe"])
    assert names(Corpus.read([folder])) == ["b/two.txt", "one.md"]


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Root may read everything: be somebody else."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_unreadable_folder_or_file_is_named(unprivileged: None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "open").write_text("some text")
        (folder / "locked").mkdir(mode=0)
        with pytest.raises(PermissionError, match="locked"):
            Corpus.read([folder])
        (folder / "locked").rmdir()
        (folder / "secret").touch(mode=0)
        with pytest.raises(PermissionError, match="secret"):
            Corpus.read([folder])
