"""Modules: an operation together with its parameters."""

from onchip.nn.mlp import GatedMLP

__all__ = ["GatedMLP"]
