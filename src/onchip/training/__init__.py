"""Training: settings, the loop, checkpoints that resume bit for bit, and what the result is worth."""

from onchip.training.config import TrainConfig
from onchip.training.evaluation import bits_per_byte, compressed_bits_per_byte
from onchip.training.loop import Trainer
from onchip.training.presets import PRESETS
from onchip.training.run import Request, RunFolder

__all__ = [
    "PRESETS",
    "Request",
    "RunFolder",
    "TrainConfig",
    "Trainer",
    "bits_per_byte",
    "compressed_bits_per_byte",
]
