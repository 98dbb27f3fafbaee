"""Bits per byte: of a model, and of the compressors anyone has."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from onchip.data import ByteTokenizer, Document, Tokenizer, consecutive, token_stream
from onchip.training.distributed import Processes

_TOKENS_AT_ONCE = 8192  # enough to keep the processor busy with matrices, few enough for any memory


@torch.inference_mode()
def bits_per_byte(
    model: nn.Module,
    documents: Sequence[Document],
    *,
    context: int,
    windows: int | None = None,
    autocast: torch.autocast | None = None,
    processes: Processes | None = None,
    tokenizer: Tokenizer | None = None,
) -> float:
    r"""What it would cost to store `documents` with the predictions of `model`, in bits per byte.

        −Σ log₂ p(token | the tokens before it in its window) / bytes

    The sum runs over every token (`tokenizer`'s, by default bytes), the first of a document too, and over the boundary
    that ends each document; a decompressor could rebuild the documents from no more. A window starts without what came
    before it, which a model with a longer memory could use: the figure is an upper bound. `windows` takes that many
    windows, evenly spread, for a quick look. `processes` share the work. Sums in float64; cost: one forward pass over
    the documents.

    >>> from onchip.models import LanguageModel
    >>> from onchip.training import PRESETS
    >>> untrained = LanguageModel(PRESETS["tiny"].model)  # finds 257 tokens about equally likely
    >>> 8 < bits_per_byte(untrained, [Document("a", b"to be or not to be")], context=64) < 9
    True
    """
    processes, tokenizer = processes or Processes(), tokenizer or ByteTokenizer()
    lengths = torch.tensor([len(tokenizer.decode([token])) for token in range(tokenizer.vocab_size)])
    stream = token_stream(documents, tokenizer)
    device = next(model.parameters()).device
    bits, size = 0.0, 0.0
    for number, part in enumerate(
        consecutive(stream, max(1, _TOKENS_AT_ONCE // context), context, windows, tokenizer.boundary_id)
    ):
        if number % processes.count != processes.rank:
            continue
        size += lengths[part.targets].sum().item()
        tokens, targets, cu_seqlens = part.to(device)
        with autocast or torch.autocast(device.type, enabled=False):
            logits = model(tokens, cu_seqlens=cu_seqlens)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        bits += losses.double().sum().item() / math.log(2)
    bits, size = processes.sum(bits, size)
    return bits / size


def compressed_bits_per_byte(documents: Sequence[Document]) -> dict[str, float]:
    """What `gzip -9` and `xz -9` need for the same documents, one after the other as one file: their kindest case.

    >>> compressed_bits_per_byte([Document("a", b"to be or not to be, that is the question" * 100)])["gzip -9"] < 0.3
    True
    """
    data = b"".join(document.data for document in documents)
    packed = {"gzip -9": gzip.compress(data, 9), "xz -9": lzma.compress(data, preset=9)}
    return {name: 8 * len(packed[name]) / len(data) for name in packed}
