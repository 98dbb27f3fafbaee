"""`import mamba_ssm` finding onchip."""

from onchip.integrations import _install
from onchip.integrations._install import Emulated

EMULATED = "2.2.6"
"""The version of mamba-ssm whose functions these are."""

_HERE = "onchip.integrations.mamba_ssm"
_MAMBA_SSM = Emulated(
    "mamba_ssm",
    "mamba-ssm",
    EMULATED,
    {
        "mamba_ssm": _HERE,
        "mamba_ssm.ops": None,
        "mamba_ssm.ops.selective_scan_interface": f"{_HERE}.selective_scan_interface",
        "mamba_ssm.ops.triton": None,
        "mamba_ssm.ops.triton.layernorm_gated": f"{_HERE}.layernorm_gated",
        "mamba_ssm.ops.triton.selective_state_update": f"{_HERE}.selective_state_update",
        "mamba_ssm.ops.triton.ssd_combined": f"{_HERE}.ssd_combined",
    },
)


def install(*, replace: bool = False) -> None:
    """Make `import mamba_ssm` find onchip's functions, in this process, until `uninstall`.

    Of mamba-ssm there are then `mamba_ssm`, `mamba_ssm.ops.selective_scan_interface`, and of `mamba_ssm.ops.triton` the
    modules `layernorm_gated`, `selective_state_update` and `ssd_combined`, and the metadata of a distribution mamba-ssm
    2.2.6. Call it before the import of what looks for mamba-ssm: transformers looks when a model's module is imported,
    and `onchip.integrations.transformers.register` serves it better.

    Args:
        replace: go before a mamba-ssm that is really installed, instead of refusing.

    Raises:
        RuntimeError: a real one is installed or imported.

    >>> from onchip.integrations import mamba_ssm
    >>> mamba_ssm.install()
    >>> from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    >>> mamba_chunk_scan_combined.__module__
    'onchip.integrations.mamba_ssm.ssd_combined'
    >>> mamba_ssm.uninstall()
    """
    uninstall()
    _install.install([_MAMBA_SSM], replace=replace)


def uninstall() -> None:
    """Undo `install`; what was imported from onchip stays where it was imported to.

    >>> from onchip.integrations import mamba_ssm
    >>> mamba_ssm.uninstall()
    """
    _install.uninstall([_MAMBA_SSM.package])
