"""Modules: an operation together with its parameters."""

from onchip.nn.mlp import MLP, GatedMLP

__all__ = ["MLP", "GatedMLP"]
