"""Sequence mixers: modules that map `(B, T, d_model)` to the same shape along time."""

import inspect
from collections.abc import Mapping
from typing import Any

from onchip.nn.mixers.attention import Attention, AttentionState
from onchip.nn.mixers.base import MissingForm, Mixer, State
from onchip.nn.mixers.hippo import HiPPO
from onchip.nn.mixers.lssl import LSSL
from onchip.nn.mixers.mamba import Mamba
from onchip.nn.mixers.mamba2 import Mamba2
from onchip.nn.mixers.s4 import S4
from onchip.nn.mixers.s4d import S4D
from onchip.nn.mixers.selective import MambaState

__all__ = [
    "LSSL",
    "MIXERS",
    "S4",
    "S4D",
    "Attention",
    "AttentionState",
    "HiPPO",
    "Mamba",
    "Mamba2",
    "MambaState",
    "MissingForm",
    "Mixer",
    "State",
    "build_mixer",
]

MIXERS: dict[str, type[Mixer[Any]]] = {
    "attention": Attention,
    "hippo": HiPPO,
    "lssl": LSSL,
    "s4": S4,
    "s4d": S4D,
    "mamba": Mamba,
    "mamba2": Mamba2,
}
"""The mixers that a config can name. Add your own: a class whose first argument is `d_model`."""


def build_mixer(d_model: int, config: Mapping[str, Any]) -> Mixer[Any]:
    """The mixer that `config` names under "mixer", made with the config's other entries as its arguments.

    Raises:
        ValueError: no such mixer; an argument that is unknown, missing or refused by the mixer.
        TypeError: an argument of a wrong type.

    >>> build_mixer(64, {"mixer": "attention", "n_heads": 4, "window": [31, 0]}).window
    (31, 0)
    """
    arguments = dict(config)
    name = arguments.pop("mixer", None)
    if name not in MIXERS:
        raise ValueError(f'"mixer" must be one of {", ".join(sorted(MIXERS))}, got {name!r}')
    parameters = list(inspect.signature(MIXERS[name]).parameters.values())[1:]
    known = {parameter.name for parameter in parameters}
    required = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
    if unknown := sorted(arguments.keys() - known):
        raise ValueError(f"{name} has no argument {', '.join(unknown)}; it knows {', '.join(sorted(known))}")
    if missing := sorted(required - arguments.keys()):
        raise ValueError(f"{name} needs {', '.join(missing)}")
    return MIXERS[name](d_model, **arguments)
