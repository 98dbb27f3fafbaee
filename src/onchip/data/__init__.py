"""Text to batches: files, documents, tokens, packed windows."""

from onchip.data.batches import Batch, Batches, consecutive, token_stream
from onchip.data.corpus import Corpus, Document
from onchip.data.pretrained import PretrainedTokenizer, load_tokenizer
from onchip.data.tokens import ByteTokenizer, Tokenizer

__all__ = [
    "Batch",
    "Batches",
    "ByteTokenizer",
    "Corpus",
    "Document",
    "PretrainedTokenizer",
    "Tokenizer",
    "consecutive",
    "load_tokenizer",
    "token_stream",
]
