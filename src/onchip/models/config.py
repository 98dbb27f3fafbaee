"""What a language model is made of, as plain JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, Self


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a `LanguageModel`.

    Args:
        vocab_size: tokens that the model knows.
        d_model: features of the residual stream.
        layers: one entry per layer, `{"mixer": name, …}` with the arguments of that mixer (see `onchip.nn.mixers`).
            Layers may differ, and have a "d_mlp" of their own.
        d_mlp: hidden features of each layer's MLP; None for layers that are a mixer alone.
        tie_embeddings: whether the output projection is the embedding's matrix.
        norm_eps: added to the mean square in the norms.
        norm: "rms" (a gain) or "layer" (mean taken out; a gain and a bias).
        mlp: "swiglu" (`onchip.nn.GatedMLP`) or "gelu" (`onchip.nn.MLP`).
        mlp_bias: whether the projections of the MLPs have biases.
        positions: an embedding is learned for each of this many positions and added to the tokens', and no sequence may
            be longer; None for none, as a mixer brings its own.
        residual_in_fp32: whether the residual stream is float32 where the weights are narrower.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.

    >>> config = ModelConfig(vocab_size=257, d_model=64, layers=[{"mixer": "attention", "n_heads": 4}] * 2, d_mlp=160)
    >>> ModelConfig.from_dict(config.to_dict()) == config
    True
    """

    vocab_size: int
    d_model: int
    layers: Sequence[Mapping[str, Any]]
    d_mlp: int | None
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    norm: Literal["rms", "layer"] = "rms"
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    mlp_bias: bool = False
    positions: int | None = None
    residual_in_fp32: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "d_mlp", "positions"):
            _check_size(name, getattr(self, name), nullable=name in ("d_mlp", "positions"))
        for name in ("tie_embeddings", "mlp_bias", "residual_in_fp32"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name, known in (("norm", ("rms", "layer")), ("mlp", ("swiglu", "gelu"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, got {getattr(self, name)!r}")
        if not isinstance(self.norm_eps, int | float) or not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be a positive number, got {self.norm_eps!r}")
        if isinstance(self.layers, str | Mapping) or not isinstance(self.layers, Sequence):
            raise TypeError(f"layers must be a list, got {self.layers!r}")
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, Mapping) or "mixer" not in layer:
                raise ValueError(f'layers[{i}] must be {{"mixer": name, …}}, got {layer!r}')
            _check_size(f"layers[{i}].d_mlp", layer.get("d_mlp"), nullable=True)
        # As JSON has it (a tuple becomes a list), so that a config equals the one read back from its file.
        layers = tuple(json.loads(json.dumps(dict(layer))) for layer in self.layers)
        object.__setattr__(self, "layers", layers)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON knows it."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that `to_dict` described.

        Raises:
            ValueError: unknown or missing keys, a value out of range.
            TypeError: a value of the wrong type.
        """
        known = {field.name: field.default is MISSING for field in fields(cls)}
        if not isinstance(values, Mapping):
            raise TypeError(f"a model config must be an object, got {type(values).__name__}")
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"a model config has no {', '.join(unknown)}; it knows {', '.join(known)}")
        if missing := [name for name, required in known.items() if required and name not in values]:
            raise ValueError(f"a model config needs {', '.join(missing)}")
        return cls(**values)


def _check_size(name: str, value: Any, *, nullable: bool) -> None:
    if nullable and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")
