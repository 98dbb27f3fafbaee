"""mamba-ssm's functions, with its names, layouts, argument order and returns, computed by onchip.

>>> from onchip.integrations import mamba_ssm
>>> mamba_ssm.install()
>>> from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
>>> mamba_ssm.uninstall()
"""

from onchip.integrations.mamba_ssm._install import EMULATED, install, uninstall
from onchip.integrations.mamba_ssm.selective_scan_interface import mamba_inner_fn, selective_scan_fn

__all__ = ["install", "mamba_inner_fn", "selective_scan_fn", "uninstall"]
__version__ = EMULATED
