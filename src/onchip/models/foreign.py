"""Checkpoints as transformers writes them: for each family, its config in our terms and its tensors' names and layouts.

A tensor of ours is one or several of theirs, one below the other. Each is as it is, transposed (GPT-2 keeps its weights
as (in, out)), has the rows of a rotary head in another order (theirs turns feature i with i + D/2, ours 2i with
2i + 1), or an axis of 1 in the middle (the filters of a depthwise convolution).
All of this moves numbers and computes none, so that a checkpoint read and written again is the same, bit for bit.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from onchip.models.config import ModelConfig

Layout = Literal["plain", "transposed", "rotary", "depthwise"]


class Part(NamedTuple):
    """A tensor of theirs; `{i}` stands for the layer's number."""

    name: str
    layout: Layout = "plain"


Table = Mapping[str, tuple[Part, ...]]


@dataclass(frozen=True)
class Family:
    """One of transformers' families of models: `model_type` in its config.json."""

    config: Callable[["Fields"], ModelConfig]
    table: Table
    ignored: str
    """Tensors without a number that was learned, which some checkpoints hold."""
    prefix: str = ""
    """What precedes all names but the head's, and which some checkpoints leave out."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Names that older checkpoints have, and what they are called today."""

    def to_ours(self, tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
        """Their tensors, complete and of the right shapes, under our names and in our layouts."""
        return {
            ours: torch.cat([_to_ours(tensors[part.name], part.layout, config) for part in parts]).contiguous()
            for ours, parts in self._names(config)
            if parts[0].name in tensors
        }

    def to_theirs(self, tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
        """Our tensors under their names and in their layouts."""
        theirs = {}
        for ours, parts in self._names(config):
            if ours in tensors:
                pieces = torch.split(tensors[ours], _rows(ours, len(tensors[ours]), config))
                for part, piece in zip(parts, pieces, strict=True):
                    theirs[part.name] = _to_theirs(piece, part.layout, config).contiguous()
        return theirs

    def canonical(self, tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
        """The tensors of a checkpoint under their full names of today, without those that say nothing."""
        if self.prefix and not any(name.startswith(self.prefix) for name in tensors):
            tensors = {name if name == _HEAD else self.prefix + name: tensor for name, tensor in tensors.items()}
        kept = {
            self.renamed.get(name, name): tensor
            for name, tensor in tensors.items()
            if not re.fullmatch(self.ignored, name)
        }
        embedding = kept.get(self.table["embedding.weight"][0].name)
        if config.tie_embeddings and _HEAD in kept and embedding is not None and torch.equal(kept[_HEAD], embedding):
            del kept[_HEAD]
        return kept

    def _names(self, config: ModelConfig) -> Iterator[tuple[str, tuple[Part, ...]]]:
        """Our names, of which a model of this config may lack biases and the head, with theirs."""
        for ours, parts in self.table.items():
            for i in range(len(config.layers) if "{i}" in ours else 1):
                yield (
                    ours.replace("{i}", str(i)),
                    tuple(Part(part.name.replace("{i}", str(i)), part.layout) for part in parts),
                )


class Fields:
    """Their config.json, field by field; the defaults are transformers', which leaves out what equals them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or `default` where it is missing or null."""
        value = self._values.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive whole number; required without a default."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
        return value

    def nullable_integer(self, name: str, default: int) -> int | None:
        """A positive whole number, or None where the file says null."""
        return None if name in self._values and self._values[name] is None else self.integer(name, default)

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"{name} must be a positive number, got {value!r}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        return value

    def only(self, name: str, *accepted: Any, default: Any = None) -> None:
        """See that the field, `default` where it is missing, is one of those that onchip's model has."""
        value = self.get(name, default)
        if value not in accepted:
            known = " or ".join(repr(one) for one in accepted)
            raise ValueError(f"{name} must be {known} for onchip's model, got {value!r}")


def _llama(fields: Fields) -> ModelConfig:
    bias = fields.boolean("attention_bias", False)
    return _llama_like(fields, mlp_bias=fields.boolean("mlp_bias", False), bias=bias)


def _mistral(fields: Fields) -> ModelConfig:
    window = fields.nullable_integer("sliding_window", 4096)
    # Theirs counts the query's own token.
    return _llama_like(fields, bias=False, window=None if window is None else [window - 1, 0])


def _qwen2(fields: Fields) -> ModelConfig:
    fields.only("use_sliding_window", False, default=False)
    if set(fields.get("layer_types", ())) - {"full_attention"}:
        raise ValueError(f"layer_types must be full_attention throughout, got {fields.get('layer_types')}")
    return _llama_like(fields, bias="qkv")


def _llama_like(fields: Fields, *, mlp_bias: bool = False, **mixer: Any) -> ModelConfig:
    fields.only("hidden_act", "silu", default="silu")
    fields.only("pretraining_tp", 1, default=1)
    fields.only("partial_rotary_factor", 1.0, default=1.0)
    d_model, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    layer = {
        "mixer": "attention",
        "n_heads": n_heads,
        "n_kv_heads": fields.integer("num_key_value_heads", n_heads),
        "head_dim": fields.integer("head_dim", d_model // n_heads),
        **_rope(fields),
        **mixer,
    }
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        d_model=d_model,
        layers=[layer] * fields.integer("num_hidden_layers"),
        d_mlp=fields.integer("intermediate_size"),
        tie_embeddings=fields.boolean("tie_word_embeddings", False),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        mlp_bias=mlp_bias,
    )


def _rope(fields: Fields) -> dict[str, Any]:
    """The rotary embedding: `rope_parameters`, or as older files have it `rope_theta` and `rope_scaling`."""
    rope = dict(fields.get("rope_parameters", None) or fields.get("rope_scaling", None) or {})
    base = float(rope.get("rope_theta", fields.number("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor must be 1 for onchip's model, got {rope['partial_rotary_factor']}")
    if kind == "default":
        return {"rope_base": base}
    if kind != "llama3":
        raise ValueError(f"rope_type must be default or llama3 for onchip's model, got {kind!r}")
    names = {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_length": "original_max_position_embeddings",
    }
    if missing := [theirs for theirs in names.values() if theirs not in rope]:
        raise ValueError(f"rope_type llama3 needs {', '.join(missing)}, got {rope}")
    return {"rope_base": base, "rope_scaling": {ours: rope[theirs] for ours, theirs in names.items()}}


def _gpt2(fields: Fields) -> ModelConfig:
    fields.only("activation_function", "gelu_new", "gelu_pytorch_tanh", default="gelu_new")
    fields.only("scale_attn_weights", True, default=True)
    fields.only("scale_attn_by_inverse_layer_idx", False, default=False)
    fields.only("add_cross_attention", False, default=False)
    d_model = fields.integer("n_embd")
    layer = {"mixer": "attention", "n_heads": fields.integer("n_head"), "rope_base": None, "bias": True}
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        d_model=d_model,
        layers=[layer] * fields.integer("n_layer"),
        d_mlp=fields.integer("n_inner", 4 * d_model),
        tie_embeddings=fields.boolean("tie_word_embeddings", True),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        norm="layer",
        mlp="gelu",
        mlp_bias=True,
        positions=fields.integer("n_positions"),
    )


def _mamba(fields: Fields) -> ModelConfig:
    rank = fields.get("time_step_rank", "auto")
    return _mamba_like(
        fields,
        tied=True,
        mixer="mamba",
        dt_rank="auto" if rank == "auto" else fields.integer("time_step_rank"),
        d_state=fields.integer("state_size", 16),
    )


def _mamba2(fields: Fields) -> ModelConfig:
    d_model, expand = fields.integer("hidden_size"), fields.integer("expand", 2)
    n_heads, head_dim = fields.integer("num_heads", 128), fields.integer("head_dim", 64)
    if n_heads * head_dim != expand * d_model:
        raise ValueError(
            f"num_heads must be expand · hidden_size / head_dim = {expand * d_model / head_dim}, got {n_heads}"
        )
    return _mamba_like(
        fields,
        tied=False,
        mixer="mamba2",
        head_dim=head_dim,
        n_groups=fields.integer("n_groups", 8),
        d_state=fields.integer("state_size", 128),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        dt_limit=_dt_limit(fields),
    )


def _mamba_like(fields: Fields, *, tied: bool, **mixer: Any) -> ModelConfig:
    fields.only("hidden_act", "silu", "swish", default="silu")
    layer = {
        **mixer,
        "d_conv": fields.integer("conv_kernel", 4),
        "expand": fields.integer("expand", 2),
        "conv_bias": fields.boolean("use_conv_bias", True),
        "bias": fields.boolean("use_bias", False),
    }
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        d_model=fields.integer("hidden_size"),
        layers=[layer] * fields.integer("num_hidden_layers"),
        d_mlp=None,
        tie_embeddings=fields.boolean("tie_word_embeddings", tied),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        residual_in_fp32=fields.boolean("residual_in_fp32", True),
    )


def _dt_limit(fields: Fields) -> list[float | None] | None:
    """The range of dt's step; None for theirs, which is that of every softplus. JSON has no infinity of its own."""
    limits = fields.get("time_step_limit", [0.0, math.inf])
    try:
        low, high = (float(limit["__float__"] if isinstance(limit, Mapping) else limit) for limit in limits)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"time_step_limit must be a pair of numbers, got {limits!r}") from None
    return None if (low, high) == (0.0, math.inf) else [low, None if high == math.inf else high]


_HEAD = "lm_head.weight"
_BLOCK = "model.layers.{i}."

LLAMA: Table = {
    "embedding.weight": (Part("model.embed_tokens.weight"),),
    "layers.{i}.mixer_norm.weight": (Part(_BLOCK + "input_layernorm.weight"),),
    **{
        f"layers.{{i}}.mixer.qkv.{kind}": (
            Part(f"{_BLOCK}self_attn.q_proj.{kind}", "rotary"),
            Part(f"{_BLOCK}self_attn.k_proj.{kind}", "rotary"),
            Part(f"{_BLOCK}self_attn.v_proj.{kind}"),
        )
        for kind in ("weight", "bias")
    },
    "layers.{i}.mixer.out.weight": (Part(_BLOCK + "self_attn.o_proj.weight"),),
    "layers.{i}.mixer.out.bias": (Part(_BLOCK + "self_attn.o_proj.bias"),),
    "layers.{i}.mlp_norm.weight": (Part(_BLOCK + "post_attention_layernorm.weight"),),
    **{
        f"layers.{{i}}.mlp.gate_up.{kind}": (Part(f"{_BLOCK}mlp.gate_proj.{kind}"), Part(f"{_BLOCK}mlp.up_proj.{kind}"))
        for kind in ("weight", "bias")
    },
    "layers.{i}.mlp.out.weight": (Part(_BLOCK + "mlp.down_proj.weight"),),
    "layers.{i}.mlp.out.bias": (Part(_BLOCK + "mlp.down_proj.bias"),),
    "norm.weight": (Part("model.norm.weight"),),
    "head.weight": (Part(_HEAD),),
}

_GPT2_MODULES: dict[str, tuple[str, Layout]] = {
    "mixer_norm": ("ln_1", "plain"),
    "mixer.qkv": ("attn.c_attn", "transposed"),
    "mixer.out": ("attn.c_proj", "transposed"),
    "mlp_norm": ("ln_2", "plain"),
    "mlp.up": ("mlp.c_fc", "transposed"),
    "mlp.out": ("mlp.c_proj", "transposed"),
}
GPT2: Table = {
    "embedding.weight": (Part("transformer.wte.weight"),),
    "positions.weight": (Part("transformer.wpe.weight"),),
    **{
        f"layers.{{i}}.{ours}.weight": (Part(f"transformer.h.{{i}}.{theirs}.weight", layout),)
        for ours, (theirs, layout) in _GPT2_MODULES.items()
    },
    **{
        f"layers.{{i}}.{ours}.bias": (Part(f"transformer.h.{{i}}.{theirs}.bias"),)
        for ours, (theirs, _) in _GPT2_MODULES.items()
    },
    "norm.weight": (Part("transformer.ln_f.weight"),),
    "norm.bias": (Part("transformer.ln_f.bias"),),
    "head.weight": (Part(_HEAD),),
}

_MIXER = "backbone.layers.{i}.mixer."
_MAMBA_LIKE: Table = {
    "embedding.weight": (Part("backbone.embeddings.weight"),),
    "layers.{i}.mixer_norm.weight": (Part("backbone.layers.{i}.norm.weight"),),
    "layers.{i}.mixer.conv.weight": (Part(_MIXER + "conv1d.weight", "depthwise"),),
    **{
        f"layers.{{i}}.mixer.{ours}": (Part(_MIXER + theirs),)
        for ours, theirs in {
            "in_proj.weight": "in_proj.weight",
            "in_proj.bias": "in_proj.bias",
            "conv.bias": "conv1d.bias",
            "A_log": "A_log",
            "D": "D",
            "out.weight": "out_proj.weight",
            "out.bias": "out_proj.bias",
        }.items()
    },
    "norm.weight": (Part("backbone.norm_f.weight"),),
    "head.weight": (Part(_HEAD),),
}
MAMBA: Table = {
    **_MAMBA_LIKE,
    "layers.{i}.mixer.x_proj.weight": (Part(_MIXER + "x_proj.weight"),),
    "layers.{i}.mixer.dt_proj.weight": (Part(_MIXER + "dt_proj.weight"),),
    "layers.{i}.mixer.dt_bias": (Part(_MIXER + "dt_proj.bias"),),
}
MAMBA2: Table = {
    **_MAMBA_LIKE,
    "layers.{i}.mixer.dt_bias": (Part(_MIXER + "dt_bias"),),
    "layers.{i}.mixer.norm.weight": (Part(_MIXER + "norm.weight"),),
}

_OLD_EMBEDDING = {"backbone.embedding.weight": "backbone.embeddings.weight"}
_ROTARY_BUFFERS = r".*\.rotary_emb\.inv_freq"
FAMILIES = {
    "llama": Family(_llama, LLAMA, _ROTARY_BUFFERS),
    "mistral": Family(_mistral, LLAMA, _ROTARY_BUFFERS),
    "qwen2": Family(_qwen2, LLAMA, _ROTARY_BUFFERS),
    "gpt2": Family(_gpt2, GPT2, r"transformer\.h\.\d+\.attn\.(bias|masked_bias)", prefix="transformer."),
    "mamba": Family(_mamba, MAMBA, "", renamed=_OLD_EMBEDDING),
    "mamba2": Family(_mamba2, MAMBA2, "", renamed=_OLD_EMBEDDING),
}


def read_foreign(values: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """The family and our config of a model that transformers' config.json describes.

    Raises:
        ValueError: a family that onchip's model does not cover, or a field that it has no equal for; both named.
    """
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(sorted(FAMILIES))}, got {kind!r}")
    fields = Fields(values)
    fields.only("quantization_config", None)
    return FAMILIES[kind], FAMILIES[kind].config(fields)


def _head_dim(config: ModelConfig) -> int:
    layer = config.layers[0]
    return int(layer.get("head_dim", config.d_model // layer["n_heads"]))


def _rows(ours: str, total: int, config: ModelConfig) -> list[int]:
    """How many rows of a tensor of ours each of theirs makes up."""
    layer = config.layers[0]
    if ".qkv." in ours and "n_kv_heads" in layer:
        q, k = (layer[name] * _head_dim(config) for name in ("n_heads", "n_kv_heads"))
        return [q, k, k]
    return [total // 2] * 2 if ".gate_up." in ours else [total]


def _to_ours(tensor: Tensor, layout: Layout, config: ModelConfig) -> Tensor:
    if layout == "rotary":
        return tensor.reshape(-1, 2, _head_dim(config) // 2, *tensor.shape[1:]).transpose(1, 2).flatten(0, 2)
    if layout == "depthwise":
        return tensor.squeeze(1)
    return tensor.T if layout == "transposed" else tensor


def _to_theirs(tensor: Tensor, layout: Layout, config: ModelConfig) -> Tensor:
    if layout == "rotary":
        return tensor.reshape(-1, _head_dim(config) // 2, 2, *tensor.shape[1:]).transpose(1, 2).flatten(0, 2)
    if layout == "depthwise":
        return tensor.unsqueeze(1)
    return tensor.T if layout == "transposed" else tensor
