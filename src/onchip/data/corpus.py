"""Files to documents: where the text comes from, and which files are held out."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_FRACTION = 0.05
_NOT_THE_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One text: its name (the path relative to the source it was found in) and its bytes."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Corpus:
    """Documents to learn from, and documents held out to judge by.

    Held out are whole files, chosen by the hash of their names: in the order of the hashes, every file that still
    fits into 5 % of the corpus's bytes; where none fits, the smallest. The choice depends on names and sizes alone, so
    every run on the same files makes the same one. Of a corpus of one file, the last 5 % of the bytes are held out.
    """

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    by_file: bool = True

    @classmethod
    def read(cls, sources: Sequence[str | Path] = ()) -> Corpus:
        """Read files, folders and glob patterns; with no source, the Python standard library's own code.

        A folder is walked recursively in sorted order, hidden files and folders skipped. Any bytes are valid text;
        empty files carry none and are left out. A file reached by two sources counts once.

        Raises `FileNotFoundError` where a source matches nothing, `PermissionError` where it cannot be read, and
        `ValueError` where there is no text in it.

        >>> corpus = Corpus.read()
        >>> len(corpus.train) > len(corpus.held_out) > 0
        True
        """
        found = [pair for source in sources for pair in _find(Path(source))] if sources else list(_standard_library())
        once = {path.resolve(): (name, path) for name, path in reversed(found)}
        documents = [Document(name, path.read_bytes()) for name, path in reversed(once.values())]
        return cls.split([document for document in documents if document.data], sources)

    @classmethod
    def split(cls, documents: Sequence[Document], sources: Sequence[str | Path] = ()) -> Corpus:
        """Hold out about 5 % of `documents`; see the class. Raises `ValueError` where there is nothing to split."""
        size = sum(len(document.data) for document in documents)
        if size < 2:
            where = " ".join(map(str, sources)) or "the given documents"
            raise ValueError(f"corpus: expected text, and found {size} bytes in {where}")
        if len(documents) == 1:
            (whole,) = documents
            cut = min(size - 1, round(size * (1 - HELD_OUT_FRACTION)))
            head, tail = Document(whole.name, whole.data[:cut]), Document(whole.name, whole.data[cut:])
            return cls((head,), (tail,), by_file=False)
        chosen = _held_out(documents, size * HELD_OUT_FRACTION)
        return cls(
            tuple(document for i, document in enumerate(documents) if i not in chosen),
            tuple(document for i, document in enumerate(documents) if i in chosen),
        )

    @property
    def fingerprint(self) -> str:
        """A hash of every byte and of the split: equal only for an equal corpus."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            for document in part:
                digest.update(f"{document.name}\0{len(document.data)}\0".encode(errors="surrogateescape"))
                digest.update(document.data)
            digest.update(b"\0held out\0")
        return digest.hexdigest()

    def __str__(self) -> str:
        held_out = _amount(self.held_out) if self.by_file else f"the last {_amount(self.held_out)} of it"
        return f"{_amount(self.train)} to learn from, held out {held_out}"


def _amount(documents: Sequence[Document]) -> str:
    size = sum(len(document.data) for document in documents)
    return f"{len(documents)} {'file' if len(documents) == 1 else 'files'} ({size:,} bytes)"


def _held_out(documents: Sequence[Document], room: float) -> set[int]:
    def hashed(i: int) -> bytes:
        return hashlib.sha256(documents[i].name.encode(errors="surrogateescape")).digest()

    chosen: set[int] = set()
    for i in sorted(range(len(documents)), key=hashed):
        if len(documents[i].data) <= room:
            chosen.add(i)
            room -= len(documents[i].data)
    return chosen or {min(range(len(documents)), key=lambda i: (len(documents[i].data), hashed(i)))}


def _find(source: Path) -> Iterator[tuple[str, Path]]:
    """The files of one source, each with its name inside the source."""
    if source.is_dir():
        yield from _walk(source)
    elif source.is_file():
        yield source.name, source
    elif source.exists():
        raise ValueError(f"corpus: expected a file or a folder, and {source} is neither")
    else:
        # Unlike Path.glob, this skips hidden files and takes absolute patterns.
        matches = [Path(match) for match in sorted(glob.glob(str(source), recursive=True))]  # noqa: PTH207
        if not any(match.exists() for match in matches):
            raise FileNotFoundError(f"corpus: no file or folder {source}")
        for match in filter(Path.exists, matches):
            yield from _find(match)


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    for place, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(place, name)
            # Sockets, pipes and dangling links are no text.
            if not name.startswith(".") and path.is_file():
                yield path.relative_to(folder).as_posix(), path


def _refuse(error: OSError) -> None:
    raise error


def _standard_library() -> Iterator[tuple[str, Path]]:
    library = Path(sysconfig.get_path("stdlib"))
    for name, path in _walk(library):
        if path.suffix == ".py" and not _NOT_THE_LIBRARY.intersection(Path(name).parts):
            yield name, path
