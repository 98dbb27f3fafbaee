"""Text from a language model: prompts are read once, then each token is one step on the carried state."""

from onchip.generation.generate import Completion, Piece, generate, stream
from onchip.generation.sampling import Sampling

__all__ = ["Completion", "Piece", "Sampling", "generate", "stream"]
