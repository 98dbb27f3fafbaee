"""`import flash_attn` finding onchip."""

from onchip.integrations import _install
from onchip.integrations._install import Emulated

EMULATED = "2.8.3"
"""The version of flash-attn whose functions these are."""

_HERE = "onchip.integrations.flash_attn"
_FLASH_ATTN_2 = Emulated(
    "flash_attn",
    "flash-attn",
    EMULATED,
    {
        "flash_attn": _HERE,
        "flash_attn.flash_attn_interface": f"{_HERE}.flash_attn_interface",
        "flash_attn.bert_padding": f"{_HERE}.bert_padding",
    },
)
_FLASH_ATTN_3 = Emulated("flash_attn_interface", "flash-attn-3", "3.0.0", {"flash_attn_interface": f"{_HERE}.hopper"})


def install(*, hopper: bool = False, replace: bool = False) -> None:
    """Make `import flash_attn` find onchip's functions, in this process, until `uninstall`.

    Of flash-attn there are then `flash_attn`, `flash_attn.flash_attn_interface` and `flash_attn.bert_padding`, and
    the metadata of a distribution flash-attn 2.8.3, by which libraries recognise it. Call it before the import of
    what looks for flash-attn, as most libraries look once. A second call changes what the first one installed.

    Args:
        hopper: install FlashAttention-3's module too, `flash_attn_interface`.
        replace: go before a flash-attn that is really installed, instead of refusing.

    Raises:
        RuntimeError: a real one is installed or imported.

    >>> from onchip.integrations import flash_attn
    >>> flash_attn.install()
    >>> from flash_attn.bert_padding import pad_input
    >>> pad_input.__module__
    'onchip.integrations.flash_attn.bert_padding'
    >>> flash_attn.uninstall()
    """
    uninstall()
    _install.install([_FLASH_ATTN_2, _FLASH_ATTN_3] if hopper else [_FLASH_ATTN_2], replace=replace)


def uninstall() -> None:
    """Undo `install`; what was imported from onchip stays where it was imported to.

    >>> from onchip.integrations import flash_attn
    >>> flash_attn.uninstall()
    """
    _install.uninstall([_FLASH_ATTN_2.package])
