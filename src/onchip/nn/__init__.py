"""Modules: an operation together with its parameters."""

from onchip.nn.conv import CausalConv1d
from onchip.nn.linear import Linear
from onchip.nn.mlp import MLP, GatedMLP
from onchip.nn.norm import RMSNormGated

__all__ = ["MLP", "CausalConv1d", "GatedMLP", "Linear", "RMSNormGated"]
