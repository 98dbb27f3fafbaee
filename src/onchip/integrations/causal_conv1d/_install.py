"""`import causal_conv1d` finding onchip."""

from onchip.integrations import _install
from onchip.integrations._install import Emulated

EMULATED = "1.5.0"
"""The version of causal-conv1d whose functions these are."""

_HERE = "onchip.integrations.causal_conv1d"
_CAUSAL_CONV1D = Emulated(
    "causal_conv1d",
    "causal-conv1d",
    EMULATED,
    {
        "causal_conv1d": _HERE,
        "causal_conv1d.causal_conv1d_interface": f"{_HERE}.causal_conv1d_interface",
        "causal_conv1d.causal_conv1d_varlen": f"{_HERE}.causal_conv1d_varlen",
    },
)


def install(*, replace: bool = False) -> None:
    """Make `import causal_conv1d` find onchip's functions, in this process, until `uninstall`.

    Of causal-conv1d there are then `causal_conv1d`, `causal_conv1d.causal_conv1d_interface` and
    `causal_conv1d.causal_conv1d_varlen`, and the metadata of a distribution causal-conv1d 1.5.0. Call it before the
    import of what looks for causal-conv1d: transformers looks when a model's module is imported.

    Args:
        replace: go before a causal-conv1d that is really installed, instead of refusing.

    Raises:
        RuntimeError: a real one is installed or imported.

    >>> from onchip.integrations import causal_conv1d
    >>> causal_conv1d.install()
    >>> from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn
    >>> causal_conv1d_fn.__module__
    'onchip.integrations.causal_conv1d.causal_conv1d_interface'
    >>> causal_conv1d.uninstall()
    """
    uninstall()
    _install.install([_CAUSAL_CONV1D], replace=replace)


def uninstall() -> None:
    """Undo `install`; what was imported from onchip stays where it was imported to.

    >>> from onchip.integrations import causal_conv1d
    >>> causal_conv1d.uninstall()
    """
    _install.uninstall([_CAUSAL_CONV1D.package])
