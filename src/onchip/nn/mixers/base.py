"""What every sequence mixer is: one structured T×T matrix per head, in parallel, chunked and step form.

`onchip.testing` holds every mixer to what is said here.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, Self, TypeVar, overload

import torch
from torch import Tensor, nn

from onchip.ops._sequence import check_boundaries


class MissingForm(TypeError):
    """A mixer was asked for a form that its mathematics does not have, such as the step of a bidirectional one."""


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """What a mixer carries from one token to the next: a typed container of tensors, one row per sequence.

    A state is a value: using it leaves it as it was, so two continuations may start from the same state. Who needs the
    newest alone says so with `expendable`.

    A subclass is a frozen dataclass. Where all of its fields are tensors whose first dimension is the batch, it is
    complete; otherwise it overrides the methods here.
    """

    def reorder(self, index: Tensor) -> Self:
        """Row i of the result is row `index[i]`; rows may be dropped and repeated. `index (N,)` int64."""
        return self._map(lambda tensor: tensor.index_select(0, index))

    def detach(self) -> Self:
        """The same values, cut from the graph of gradients (truncated back-propagation)."""
        return self._map(Tensor.detach)

    def expendable(self) -> Self:
        """The same state, and so those that follow it: a step without gradients may write the next in its place."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the state holds."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @classmethod
    def stack(cls, states: Sequence[Self]) -> Self:
        """One state with the rows of all `states`, in order; they may have seen different numbers of tokens."""
        names = states[0]._tensors()
        return dataclasses.replace(
            states[0], **{name: torch.cat([getattr(state, name) for state in states]) for name in names}
        )

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _map(self, f: Callable[[Tensor], Tensor]) -> Self:
        changes: dict[str, Any] = {name: f(tensor) for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, **changes)


S = TypeVar("S", bound=State)


class Mixer(nn.Module, ABC, Generic[S]):
    """A map `(B, T, d_model) → (B, T, d_model)` along time.

    ```
    y = mixer(x)                              parallel: training
    y = mixer(x, cu_seqlens=cu)               packed: x (total, d_model), sequence b is rows cu[b]:cu[b + 1]
    y, state = mixer(x, state)                chunked: prefill, truncated back-propagation
    y_t, state = mixer.step(x_t, state)       recurrent: decoding, x_t (B, d_model)
    state = mixer.initial_state(batch)        before the first token
    M = mixer.matrix(x)                       (B, H, T, T): what the mixer applies, for people and tests
    y = mixer.apply_matrix(x, M)              the definition: mixer(x) with `M` in place of its own matrix
    ```

    All forms give the same result. A family implements `_parallel`, `_chunk`, `initial_state`, `matrix` and
    `apply_matrix`, and `_step` where it has something better than a chunk of one token; `state_type` is its state's. A
    mixer without one of the forms raises `MissingForm`; a causal one has all but perhaps the matrix. Everything that a
    checkpoint must hold is a parameter or a persistent buffer.
    """

    d_model: int
    causal: bool
    """Whether output t depends on inputs up to t alone. Only then are there states."""
    state_type: type[State] = State
    """Of `initial_state`, and the only one that `forward` and `step` take."""
    out: nn.Linear
    """The last projection, back into the residual stream; a model starts with its weight at zero."""
    undecayed: tuple[str, ...] = ()
    """Names of its parameters that are matrices, but of no linear map: weight decay leaves them alone."""

    @overload
    def forward(self, x: Tensor, state: None = None, *, cu_seqlens: Tensor | None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, state: S) -> tuple[Tensor, S]: ...

    def forward(
        self, x: Tensor, state: S | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor | tuple[Tensor, S]:
        """The parallel form, packed with `cu_seqlens`; the chunked form with `state`.

        Raises:
            ValueError: `x` is not `(B, T, d_model)`, or `(total, d_model)` with `cu_seqlens`; or both `state` and
                `cu_seqlens` are given.
            TypeError: `state` is another mixer's; `cu_seqlens` is not of integers, or on another device.
            MissingForm: `state` is given and the mixer is not causal.
        """
        expected = "(B, T, d_model)" if cu_seqlens is None else "(total, d_model)"
        if x.ndim != (3 if cu_seqlens is None else 2) or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be {expected} with d_model = {self.d_model}, got {tuple(x.shape)}")
        if cu_seqlens is not None:
            check_boundaries(cu_seqlens, x)
        if state is None:
            return self._parallel(x, cu_seqlens)
        if cu_seqlens is not None:
            raise ValueError("state and cu_seqlens exclude each other: a state has one sequence per row")
        if not self.causal:
            raise self._missing("chunked form")
        self._check_own(state)
        return self._chunk(x, state)

    def step(self, x_t: Tensor, state: S) -> tuple[Tensor, S]:
        """One token further: `x_t (B, d_model)` to `y_t (B, d_model)` and the state after it.

        Raises:
            ValueError: `x_t` is not `(B, d_model)`.
            TypeError: `state` is another mixer's.
            MissingForm: the mixer is not causal.
        """
        if x_t.ndim != 2 or x_t.shape[1] != self.d_model:
            raise ValueError(f"x_t must be (B, d_model) with d_model = {self.d_model}, got {tuple(x_t.shape)}")
        if not self.causal:
            raise self._missing("step form")
        self._check_own(state)
        return self._step(x_t, state)

    @abstractmethod
    def _parallel(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """The parallel form; every sequence by itself where `cu_seqlens` is given."""

    def _chunk(self, x: Tensor, state: S) -> tuple[Tensor, S]:
        """The chunked form of a causal mixer; T may be 0."""
        raise self._missing("chunked form")

    def _step(self, x_t: Tensor, state: S) -> tuple[Tensor, S]:
        """The step form of a causal mixer."""
        y, state = self._chunk(x_t[:, None], state)
        return y[:, 0], state

    def initial_state(self, batch: int) -> S:
        """The state of `batch` sequences before their first token."""
        raise self._missing("state")

    def matrix(self, x: Tensor) -> Tensor:
        """The `(B, H, T, T)` matrix that the mixer applies to `x (B, T, d_model)`; memory quadratic in T."""
        raise self._missing("matrix form")

    def apply_matrix(self, x: Tensor, matrix: Tensor) -> Tensor:
        """`mixer(x)` with `matrix (B, H, T, T)` in place of the mixer's own; everything else as `x` has it.

        `apply_matrix(x, matrix(x))` is `mixer(x)`, and row t of the matrix acts on output t alone.
        """
        raise self._missing("matrix form")

    def _check_own(self, state: S) -> None:
        if not isinstance(state, self.state_type):
            name = type(self).__name__
            raise TypeError(
                f"state must be {self.state_type.__name__}, from {name}.initial_state, got {type(state).__name__}"
            )

    def _missing(self, form: str) -> MissingForm:
        return MissingForm(f"{type(self).__name__}({'' if self.causal else 'causal=False'}) has no {form}")
