"""Models: mixers stacked into networks, with their configuration and checkpoints."""

from onchip.models.checkpoint import load_model, read_config, save_model
from onchip.models.config import ModelConfig
from onchip.models.language_model import LanguageModel, ModelState

__all__ = ["LanguageModel", "ModelConfig", "ModelState", "load_model", "read_config", "save_model"]
