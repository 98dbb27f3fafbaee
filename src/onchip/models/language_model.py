"""A language model: an embedding, residual layers of a mixer and perhaps an MLP, and logits over the next token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast, overload

import torch
from torch import Tensor, nn

from onchip.models.config import ModelConfig
from onchip.nn import MLP, GatedMLP, Linear
from onchip.nn.mixers import State, build_mixer
from onchip.nn.norm import RMSNorm
from onchip.nn.rotary import packed_positions
from onchip.ops import linear


@dataclass(frozen=True, eq=False)
class ModelState(State):
    """The states of a model's layers, in order; with learned positions also how many tokens each row has seen."""

    layers: tuple[State, ...]
    seen: Tensor | None = None

    def reorder(self, index: Tensor) -> Self:
        """Row i of the result is row `index[i]`; rows may be dropped and repeated. `index (N,)` int64."""
        seen = None if self.seen is None else self.seen[index]
        return type(self)(tuple(layer.reorder(index) for layer in self.layers), seen)

    def detach(self) -> Self:
        """The same values, cut from the graph of gradients."""
        return type(self)(tuple(layer.detach() for layer in self.layers), self.seen)

    def expendable(self) -> Self:
        """The same state, and so those that follow it: a step without gradients may write the next in its place."""
        return type(self)(tuple(layer.expendable() for layer in self.layers), self.seen)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the state holds."""
        return sum(layer.nbytes for layer in self.layers) + (0 if self.seen is None else self.seen.nbytes)

    @classmethod
    def stack(cls, states: Sequence[Self]) -> Self:
        """One state with the rows of all `states`, in order; they may have seen different numbers of tokens."""
        columns = zip(*(state.layers for state in states), strict=True)
        seen = [state.seen for state in states if state.seen is not None]
        return cls(tuple(type(layers[0]).stack(layers) for layers in columns), torch.cat(seen) if seen else None)


class Layer(nn.Module):
    """A mixer along time, and an MLP along features unless it has none, on the normalised residual stream and added."""

    def __init__(self, config: ModelConfig, options: dict[str, Any]) -> None:
        super().__init__()
        d_mlp = options.pop("d_mlp", config.d_mlp)
        self.mixer_norm = _norm(config)
        self.mixer = build_mixer(config.d_model, options)
        self.mlp: GatedMLP | MLP | None = None
        if d_mlp is not None:
            self.mlp_norm = _norm(config)
            self.mlp = (GatedMLP if config.mlp == "swiglu" else MLP)(config.d_model, d_mlp, bias=config.mlp_bias)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """The parallel form."""
        return self._mix_features(x + self.mixer(self.normed(x), cu_seqlens=cu_seqlens))

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """The chunked form."""
        y, state = self.mixer(self.normed(x), state)
        return self._mix_features(x + y), state

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """The recurrent form."""
        y, state = self.mixer.step(self.normed(x), state)
        return self._mix_features(x + y), state

    def normed(self, x: Tensor) -> Tensor:
        """What the mixer reads of the residual stream."""
        return _normed(self.mixer_norm, x)

    def _mix_features(self, x: Tensor) -> Tensor:
        return x if self.mlp is None else x + self.mlp(_normed(self.mlp_norm, x))


class LanguageModel(nn.Module):
    """A causal language model, its layers' mixers named in the config.

    ```
    logits = model(tokens)                          tokens (B, T) int64, logits (B, T, vocab_size)
    logits = model(tokens, cu_seqlens=cu)           packed: tokens (total,), logits (total, vocab_size)
    logits, state = model(tokens, state)            chunked
    logits, state = model.prefill(tokens, state)    chunked, the last token's logits (B, vocab_size) alone
    logits, state = model.step(token, state)        token (B,), logits (B, vocab_size)
    ```

    The embedding starts normal with standard deviation 0.02, the projections that write into the residual stream start
    at zero, so that every layer begins as the identity at any depth; the rest is as its modules make it.

    Raises:
        ValueError: a layer that cannot be built, or is not causal.

    >>> config = ModelConfig(vocab_size=257, d_model=32, layers=[{"mixer": "attention", "n_heads": 2}], d_mlp=80)
    >>> model = LanguageModel(config)
    >>> tokens = torch.randint(257, (2, 10))
    >>> model(tokens).shape
    torch.Size([2, 10, 257])
    >>> logits, state = model.step(tokens[:, 0], model.initial_state(batch=2))
    >>> torch.allclose(logits, model(tokens)[:, 0], atol=1e-5)
    True
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = None if config.positions is None else nn.Embedding(config.positions, config.d_model)
        self.layers = nn.ModuleList(_layer(config, i) for i in range(len(config.layers)))
        self.norm = _norm(config)
        self.head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size, bias=False)
        for embedding in (self.embedding, self.positions):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)
        for layer in self._layers():
            nn.init.zeros_(layer.mixer.out.weight)
            if layer.mlp is not None:
                nn.init.zeros_(layer.mlp.out.weight)

    @property
    def num_parameters(self) -> int:
        """How many numbers the model has learned."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.embedding.weight.device

    def initial_state(self, batch: int) -> ModelState:
        """The state of `batch` sequences before their first token."""
        seen = None if self.positions is None else torch.zeros(batch, dtype=torch.int64, device=self.device)
        return ModelState(tuple(layer.mixer.initial_state(batch) for layer in self._layers()), seen)

    @overload
    def forward(self, tokens: Tensor, state: None = None, *, cu_seqlens: Tensor | None = None) -> Tensor: ...

    @overload
    def forward(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]: ...

    def forward(
        self, tokens: Tensor, state: ModelState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ModelState]:
        """Logits of the token after each of `tokens`; with `state`, of its continuation, and the state after it.

        Raises:
            ValueError: `tokens` is not `(B, T)`, or `(total,)` with `cu_seqlens`; or both `state` and `cu_seqlens` are
                given; or a sequence is longer than the learned positions.
        """
        if tokens.ndim != (2 if cu_seqlens is None else 1):
            expected = "(B, T)" if cu_seqlens is None else "(total,) with cu_seqlens"
            raise ValueError(f"tokens must be {expected}, got {tuple(tokens.shape)}")
        if state is None:
            x = self._embed(tokens, self._places(tokens, cu_seqlens))
            for layer in self._layers():
                x = layer(x, cu_seqlens)
            return self._logits(x)
        if cu_seqlens is not None:
            raise ValueError("state and cu_seqlens exclude each other: a state has one sequence per row")
        x, state = self._chunk(tokens, state)
        return self._logits(x), state

    def prefill(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Read `tokens (B, T)`, T at least 1: the logits `(B, vocab_size)` after the last, and the state after it."""
        x, state = self._chunk(tokens, state)
        return self._logits(x[:, -1]), state

    def step(self, token: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Read one `token (B,)`: the logits `(B, vocab_size)` after it, and the state after it."""
        x, states = self._embed(token, state.seen), []
        for layer, layer_state in zip(self._layers(), state.layers, strict=True):
            x, layer_state = layer.step(x, layer_state)
            states.append(layer_state)
        return self._logits(x), ModelState(tuple(states), None if state.seen is None else state.seen + 1)

    def matrices(self, tokens: Tensor) -> Iterator[Tensor]:
        """The mixing matrices `(B, H, T, T)` of each layer on `tokens (B, T)`, in turn; memory quadratic in T."""
        x = self._embed(tokens, self._places(tokens, None))
        for layer in self._layers():
            yield layer.mixer.matrix(layer.normed(x))
            x = layer(x, None)

    def _chunk(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        T, seen = tokens.shape[1], state.seen
        positions = None if seen is None else seen[:, None] + torch.arange(T, device=seen.device)
        x, states = self._embed(tokens, positions), []
        for layer, layer_state in zip(self._layers(), state.layers, strict=True):
            x, layer_state = layer.chunk(x, layer_state)
            states.append(layer_state)
        return x, ModelState(tuple(states), None if seen is None else seen + T)

    def _places(self, tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
        """Each token's place in its sequence, where the model has an embedding for it."""
        if self.positions is None:
            return None
        if cu_seqlens is not None:
            return packed_positions(cu_seqlens, len(tokens))
        return torch.arange(tokens.shape[1], device=tokens.device)

    def _embed(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        x = cast(Tensor, self.embedding(tokens))
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.positions is None or positions is None:
            return x
        limit = self.positions.num_embeddings
        if not torch.compiler.is_compiling() and positions.numel() and (last := int(positions.max())) >= limit:
            raise ValueError(f"tokens must be at most {limit}, as many as the model has positions, got {last + 1}")
        return x + cast(Tensor, self.positions(positions))

    def _logits(self, x: Tensor) -> Tensor:
        return linear(_normed(self.norm, x), self.embedding.weight if self.head is None else self.head.weight)

    def _layers(self) -> Sequence[Layer]:
        return cast(Sequence[Layer], self.layers)


def _norm(config: ModelConfig) -> nn.Module:
    kind = RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.d_model, eps=config.norm_eps)


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm of the residual stream, which may be wider than the weights."""
    return cast(Tensor, norm(x.to(norm.weight.dtype)))  # type: ignore[arg-type]


def _layer(config: ModelConfig, index: int) -> Layer:
    try:
        layer = Layer(config, dict(config.layers[index]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"layers[{index}]: {error}") from None
    if not layer.mixer.causal:
        raise ValueError(f"layers[{index}]: a language model needs causal mixers, got {dict(config.layers[index])}")
    return layer
