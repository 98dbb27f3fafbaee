"""The functions of causal-conv1d, with its names, argument order, layouts and returns, computed by onchip.

>>> from onchip.integrations import causal_conv1d
>>> causal_conv1d.install()
>>> from causal_conv1d import causal_conv1d_fn
>>> causal_conv1d.uninstall()
"""

from onchip.integrations.causal_conv1d._install import EMULATED, install, uninstall
from onchip.integrations.causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update
from onchip.integrations.causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states", "install", "uninstall"]
__version__ = EMULATED
