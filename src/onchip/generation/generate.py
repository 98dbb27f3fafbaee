"""Generation: prompts in, text out, whole or as it comes."""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch

from onchip.data import ByteTokenizer, Tokenizer
from onchip.generation.decoding import Decoding
from onchip.generation.sampling import Sampling
from onchip.generation.text import TextStream
from onchip.models import LanguageModel

Finish = Literal["end", "stop", "length"]


@dataclass(frozen=True)
class Piece:
    """One more token of the completion of `prompts[index]`.

    `text` is what became certain with it, often one character and sometimes none. `finish` is None until the last
    piece, then "end" (the model ended the document), "stop" (a stop string) or "length" (max_new_tokens).
    """

    index: int
    token: int
    text: str
    finish: Finish | None = None


@dataclass(frozen=True)
class Completion:
    """What followed a prompt. `tokens` holds all that were drawn, the boundary or those of a stop string included.

    `seed` draws the same completion again when given with this prompt alone.
    """

    text: str
    tokens: list[int]
    finish: Finish
    seed: int


def generate(
    model: LanguageModel,
    prompts: Sequence[str | bytes],
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    seed: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[Completion]:
    """Continue each of `prompts` as the beginning of a document.

    Args:
        model: a language model that knows the tokenizer's tokens.
        prompts: texts of any lengths, decoded together; may repeat (each different one is read once) and be empty.
        max_new_tokens: tokens per prompt, at least 1.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: only the k most probable tokens; None for all.
        top_p: only the most probable tokens that together reach this probability, in (0, 1].
        min_p: only tokens at least this fraction as probable as the most probable one, in [0, 1].
        stop: a completion ends before the first of these strings.
        seed: prompt i is sampled with a generator of its own, seeded with `seed + i`, so that its samples do not depend
            on the other prompts; by default another seed each time.
        tokenizer: by default `onchip.data.ByteTokenizer`.

    Returns:
        One completion per prompt, in order, without the prompt.

    Raises:
        TypeError: `prompts` or `stop` is a single string, `top_k` or `max_new_tokens` not an integer.
        ValueError: a value out of range, an empty stop string, or a model with another vocabulary.

    Cost: one parallel pass over each different prompt, then per token one step of all unfinished rows together.

    >>> from onchip.models import LanguageModel, ModelConfig
    >>> config = ModelConfig(vocab_size=257, d_model=16, layers=[{"mixer": "attention", "n_heads": 2}], d_mlp=40)
    >>> a, b = generate(LanguageModel(config), ["def f(", ""], max_new_tokens=5, seed=0)
    >>> len(a.tokens), a.finish, b.seed
    (5, 'length', 1)
    """
    if seed is None:
        seed = secrets.randbits(48)
    sampling = Sampling(temperature, top_k, top_p, min_p)
    pieces: list[list[Piece]] = [[] for _ in prompts]
    for piece in _pieces(model, prompts, sampling, max_new_tokens, stop, seed, tokenizer or ByteTokenizer()):
        pieces[piece.index].append(piece)
    return [_completion(row, seed + i) for i, row in enumerate(pieces)]


def stream(
    model: LanguageModel,
    prompts: Sequence[str | bytes],
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    seed: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> Iterator[Piece]:
    """Continue each of `prompts` as `generate` does, and give each token's text as soon as it is certain.

    Takes and raises what `generate` does, before the first piece. The pieces of different prompts come interleaved, one
    of each unfinished prompt in turn.

    >>> from onchip.models import LanguageModel, ModelConfig
    >>> config = ModelConfig(vocab_size=257, d_model=16, layers=[{"mixer": "attention", "n_heads": 2}], d_mlp=40)
    >>> pieces = stream(LanguageModel(config), ["def f(", ""], max_new_tokens=2, seed=0)
    >>> [(piece.index, piece.finish) for piece in pieces]
    [(0, None), (1, None), (0, 'length'), (1, 'length')]
    """
    if seed is None:
        seed = secrets.randbits(48)
    sampling = Sampling(temperature, top_k, top_p, min_p)
    return _pieces(model, prompts, sampling, max_new_tokens, stop, seed, tokenizer or ByteTokenizer())


def _pieces(
    model: LanguageModel,
    prompts: Sequence[str | bytes],
    sampling: Sampling,
    max_new_tokens: int,
    stop: Sequence[str],
    seed: int,
    tokenizer: Tokenizer,
) -> Iterator[Piece]:
    for name, texts in (("prompts", prompts), ("stop", stop)):
        if isinstance(texts, str | bytes):
            raise TypeError(f"{name} must be a list of strings, got the single one {texts!r}")
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool):
        raise TypeError(f"max_new_tokens must be an integer, got {max_new_tokens!r}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if "" in stop:
        raise ValueError("stop must not contain the empty string")
    if model.config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"model must have the tokenizer's vocabulary of {tokenizer.vocab_size}, has {model.config.vocab_size}"
        )
    tokens = [tokenizer.begin(prompt) for prompt in prompts]
    rows = [_Row(i, tokenizer, stop, max_new_tokens, seed + i) for i in range(len(prompts))]
    return _run(model, tokens, rows, sampling)


def _completion(pieces: Sequence[Piece], seed: int) -> Completion:
    finish = cast(Finish, pieces[-1].finish)
    return Completion("".join(piece.text for piece in pieces), [piece.token for piece in pieces], finish, seed)


class _Row:
    """One completion in progress."""

    def __init__(self, index: int, tokenizer: Tokenizer, stop: Sequence[str], limit: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self._index, self._tokenizer, self._left, self._text = index, tokenizer, limit, TextStream(stop)

    def push(self, token: int) -> Piece:
        self._left -= 1
        ended = self._tokenizer.ends(token)
        text = self._text.push(self._tokenizer.decode([token]), final=ended or not self._left)
        finish: Finish | None = (
            "stop" if self._text.stopped else "end" if ended else "length" if not self._left else None
        )
        return Piece(self._index, token, text, finish)


def _run(
    model: LanguageModel, prompts: Sequence[Sequence[int]], rows: list[_Row], sampling: Sampling
) -> Iterator[Piece]:
    if not rows:
        return
    batch = Decoding(model, prompts)
    while True:
        drawn = sampling.draw(batch.logits, [row.generator for row in rows])
        going = []
        for i, (row, token) in enumerate(zip(rows, drawn.tolist(), strict=True)):
            piece = row.push(token)
            yield piece
            if piece.finish is None:
                going.append(i)
        if not going:
            return
        if len(going) < len(rows):
            rows, drawn = [rows[i] for i in going], drawn[going]
            batch.keep(going)
        batch.feed(drawn)
