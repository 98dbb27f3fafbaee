"""Tokenizers that come with a model: `tokenizer.json`, as the tokenizers library writes it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onchip._files import atomic_write
from onchip.data.tokens import ByteTokenizer, Tokenizer


class PretrainedTokenizer:
    """The tokenizer in `folder`: `tokenizer.json`, and which tokens begin and end a text by the model's configs.

    Byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece's conversions (Llama 2, Mistral). `begin` is what the
    library itself makes of a text, special tokens included. The token of the beginning, or where there is none of the
    end, is the boundary between documents.

    Args:
        folder: where `tokenizer.json` is, with `generation_config.json` or `config.json`.
        vocab_size: of the model, which may know more tokens than the tokenizer; those stand for no bytes.

    Raises:
        FileNotFoundError: there is no `tokenizer.json`.
        ImportError: the tokenizers library is missing.
        ValueError: the file is damaged, of another kind, or knows more tokens than the model.
    """

    def __init__(self, folder: str | Path, vocab_size: int) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise ImportError("tokenizer.json needs the tokenizers library: pip install 'onchip[hf]'") from error
        path = Path(folder) / _FILE
        data = path.read_text(encoding="utf-8")
        try:
            self._library = Library.from_str(data)
            kinds = _kinds(json.loads(data).get("decoder"))
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"{path} is damaged: {error}") from None
        if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise ValueError(f"{path} must be byte-level BPE or SentencePiece's, got a decoder of {sorted(kinds)}")
        known = self._library.get_vocab_size(with_added_tokens=True)
        if known > vocab_size:
            raise ValueError(f"{path} knows {known} tokens, the model {vocab_size}")
        self.vocab_size = vocab_size
        self._bytes = _byte_level if "ByteLevel" in kinds else _sentencepiece
        added = self._library.get_added_tokens_decoder()
        self._added = {i: b"" if token.special else token.content.encode() for i, token in added.items()}
        self._first, self._last = _ends(Path(folder))
        if not self._first and not self._last:
            raise ValueError(f"{folder} names neither bos_token_id nor eos_token_id in generation_config.json")
        self.boundary_id = (self._first or self._last)[0]

    def encode(self, text: str | bytes) -> list[int]:
        """The tokens of `text`; none is added. Raises `ValueError` where bytes are not UTF-8."""
        return list(self._library.encode(_text(text), add_special_tokens=False).ids)

    def begin(self, text: str | bytes) -> list[int]:
        """The tokens of a document that begins with `text`, at least one."""
        return list(self._library.encode(_text(text), add_special_tokens=True).ids) or [self.boundary_id]

    def ends(self, token: int) -> bool:
        """Whether `token` ends a document."""
        return token in self._last or token == self.boundary_id

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for, which may end amid a character; special tokens stand for none."""
        return b"".join(map(self._decode, ids))

    def save(self, folder: str | Path) -> None:
        """Write to `folder` what the constructor reads."""
        with atomic_write(Path(folder) / _FILE) as temporary:
            temporary.write_text(self._library.to_str(), encoding="utf-8")
        ends = {"bos_token_id": self._first[0] if self._first else None, "eos_token_id": list(self._last)}
        with atomic_write(Path(folder) / _CONFIGS[0]) as temporary:
            temporary.write_text(json.dumps(ends) + "\n", encoding="utf-8")

    def _decode(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        name = self._library.id_to_token(token)
        return b"" if name is None else self._bytes(name)


def load_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of the model in `folder`: its `tokenizer.json`, or bytes where there is none.

    Raises:
        FileNotFoundError: there is none, and the model's vocabulary is not that of bytes.
        ImportError, ValueError: as `PretrainedTokenizer`.

    >>> load_tokenizer("nowhere", vocab_size=257).encode("hi")
    [104, 105]
    """
    if (Path(folder) / _FILE).exists():
        return PretrainedTokenizer(folder, vocab_size)
    if vocab_size != ByteTokenizer.vocab_size:
        raise FileNotFoundError(
            f"{folder} has no {_FILE}, which a model of {vocab_size} tokens needs; one of bytes has 257"
        )
    return ByteTokenizer()


_FILE = "tokenizer.json"
_CONFIGS = ("generation_config.json", "config.json")


def _ends(folder: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that begin and that end a text, by the first of the configs that names any."""
    for name in _CONFIGS:
        if not (folder / name).exists():
            continue
        try:
            values = json.loads((folder / name).read_bytes())
            first, last = (_ids(values.get(key)) for key in ("bos_token_id", "eos_token_id"))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / name} is damaged: {error}") from None
        if first or last:
            return first, last
    return (), ()


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(map(int, value))


def _text(text: str | bytes) -> str:
    try:
        return text if isinstance(text, str) else text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"text must be UTF-8 for a tokenizer that is not of bytes: {error}") from None


def _kinds(decoder: Any) -> set[str]:
    """The decoder's type, or those that it is made of."""
    if not isinstance(decoder, dict):
        return set()
    return {str(decoder.get("type"))}.union(*(_kinds(part) for part in decoder.get("decoders", ())))


def _alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE: itself where it can be seen, else one from U+0100 on.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners, the encoder published with it.
    """
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


_BYTE_OF = _alphabet()


def _byte_level(name: str) -> bytes:
    return bytes(_BYTE_OF[character] for character in name)


def _sentencepiece(name: str) -> bytes:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    return name.replace("▁", " ").encode()
