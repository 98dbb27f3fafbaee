"""The functions of flash-attn 2, with its names, argument order, defaults and returns, computed by onchip.

>>> from onchip.integrations import flash_attn
>>> flash_attn.install()
>>> from flash_attn import flash_attn_func
>>> flash_attn.uninstall()

FlashAttention-3's functions are in `onchip.integrations.flash_attn.hopper`.
"""

from onchip.integrations.flash_attn._install import EMULATED, install, uninstall
from onchip.integrations.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "uninstall",
]
__version__ = EMULATED
