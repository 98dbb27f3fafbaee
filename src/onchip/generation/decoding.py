"""Sequences that grow together, one token at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from onchip.models import LanguageModel, ModelState


class Decoding:
    """A batch of sequences on their carried state, and `logits (rows, vocab_size)` of the next token of each.

    Rows may have different lengths. Each different prompt is read once, in one parallel pass.

    >>> from onchip.models import ModelConfig
    >>> config = ModelConfig(vocab_size=9, d_model=8, layers=[{"mixer": "attention", "n_heads": 2}], d_mlp=16)
    >>> batch = Decoding(LanguageModel(config), [[1, 2, 3], [4]])
    >>> batch.feed(batch.logits.argmax(dim=-1))
    >>> batch.logits.shape
    torch.Size([2, 9])
    """

    @torch.inference_mode()
    def __init__(self, model: LanguageModel, prompts: Sequence[Sequence[int]]) -> None:
        self.model = model
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        read = [model.prefill(torch.tensor([p], device=model.device), model.initial_state(1)) for p in place]
        self.logits = torch.cat([logits for logits, _ in read])
        self.state = ModelState.stack([state for _, state in read]).expendable()
        if len(place) < len(prompts):
            self.keep([place[tuple(prompt)] for prompt in prompts])

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> None:
        """Append `tokens (rows,)`, one to each row."""
        self.logits, self.state = self.model.step(tokens, self.state)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; a row may repeat."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.model.device)
        self.logits, self.state = self.logits[index], self.state.reorder(index)
