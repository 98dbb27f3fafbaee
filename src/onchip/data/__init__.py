"""Text to batches: files, documents, tokens, packed windows."""

from onchip.data.batches import Batch, Batches, consecutive, token_stream
from onchip.data.corpus import Corpus, Document
from onchip.data.tokens import ByteTokenizer

__all__ = ["Batch", "Batches", "ByteTokenizer", "Corpus", "Document", "consecutive", "token_stream"]
