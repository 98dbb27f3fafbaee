"""The conformance suite passes a sound mixer of another family than attention, and finds each of these faults."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from onchip.nn.mixers import Attention, AttentionState, Mixer, State
from onchip.testing import MIXER_CHECKS, check_mixer


@dataclass(frozen=True, eq=False)
class DecayState(State):
    h: Tensor  # (B, D)


class Decay(Mixer[DecayState]):
    """h[t] = a · h[t-1] + value(x[t]), one decay a per channel: the smallest state space model."""

    state_type = DecayState

    def __init__(self, d_model: int = 6) -> None:
        super().__init__()
        self.d_model, self.causal = d_model, True
        self.value = nn.Linear(d_model, d_model)
        self.out = nn.Linear(d_model, d_model)
        self.logit = nn.Parameter(torch.zeros(d_model))

    def decay(self) -> Tensor:
        return self.logit.sigmoid()

    def initial_state(self, batch: int) -> DecayState:
        return DecayState(self.logit.new_zeros(batch, self.d_model))

    def matrix(self, x: Tensor) -> Tensor:
        distance = (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).to(x.dtype)
        powers = self.decay()[:, None, None] ** distance.clamp(min=0) * (distance >= 0)
        return powers.expand(x.shape[0], -1, -1, -1)

    def apply_matrix(self, x: Tensor, matrix: Tensor) -> Tensor:
        return self.out(torch.einsum("bdij,bjd->bid", matrix, self.value(x)))

    def _parallel(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is None:
            return self._chunk(x, self.initial_state(x.shape[0]))[0]
        lengths = cu_seqlens.diff().tolist()
        return torch.cat([self._parallel(part[None], None)[0] for part in x.split(lengths)])

    def _chunk(self, x: Tensor, state: DecayState) -> tuple[Tensor, DecayState]:
        h, hidden = state.h, []
        for value in self.value(x).unbind(dim=1):
            h = self.decay() * h + value
            hidden.append(h)
        return self.out(torch.stack(hidden, dim=1) if hidden else x * h[:, None]), DecayState(h)


class SeesTheNextToken(Decay):
    def _parallel(self, x, cu_seqlens):
        return super()._parallel(x + 0.1 * x.roll(-1, dims=-2), cu_seqlens)


class ClaimsToBeBidirectional(Decay):
    def __init__(self):
        super().__init__()
        self.causal = False


class ForgetsItsState(Decay):
    def _chunk(self, x, state):
        return super()._chunk(x, self.initial_state(x.shape[0]))


class StepsAstray(Decay):
    def _step(self, x_t, state):
        y, state = super()._step(x_t, state)
        return y * (1 + 1e-8), state


class TakesAnyState(Decay):
    state_type = State

    def _chunk(self, x, state):
        return super()._chunk(x, state if isinstance(state, DecayState) else self.initial_state(x.shape[0]))


class WritesIntoItsState(Decay):
    def _step(self, x_t, state):
        state.h.data.mul_(self.decay()).add_(self.value(x_t))
        return self.out(state.h), state


class IgnoresBoundaries(Decay):
    def _parallel(self, x, cu_seqlens):
        return super()._parallel(x, None) if cu_seqlens is None else super()._parallel(x[None], None)[0]


class MixesTheBatch(Decay):
    def _parallel(self, x, cu_seqlens):
        return super()._parallel(x, cu_seqlens) + (1e-6 * x.sum() if cu_seqlens is None else 0)


class DropsAGradient(Decay):
    def decay(self):
        return super().decay().detach()


class CutsTheStatesGradient(Decay):
    def _chunk(self, x, state):
        y, state = super()._chunk(x, state)
        return y, state.detach()


class ShowsAnotherMatrix(Decay):
    def matrix(self, x):
        return super().matrix(x).transpose(2, 3)


class IgnoresTheMatrix(Decay):
    def apply_matrix(self, x, matrix):
        return self(x)


class MasksNoPadding(Attention):
    def initial_state(self, batch):
        state = super().initial_state(batch)
        return Unmasked(state.keys, state.values)


class Unmasked(AttentionState):
    def pads(self):
        return None


class AnswersInFloat64(Decay):
    def _parallel(self, x, cu_seqlens):
        return super()._parallel(x, cu_seqlens).double()


class HidesAWeight(Decay):
    def __init__(self):
        super().__init__()
        self.scale = torch.rand(6, dtype=torch.float64)

    def _parallel(self, x, cu_seqlens):
        return super()._parallel(x, cu_seqlens) * self.scale.to(x.dtype)


FAULTS = {
    SeesTheNextToken: "check_causality",
    ClaimsToBeBidirectional: "check_chunks",
    ForgetsItsState: "check_chunks",
    StepsAstray: "check_steps",
    WritesIntoItsState: "check_states",
    TakesAnyState: "check_states",
    IgnoresBoundaries: "check_packed",
    MixesTheBatch: "check_packed",
    DropsAGradient: "check_gradients",
    CutsTheStatesGradient: "check_gradients",
    ShowsAnotherMatrix: "check_matrix",
    IgnoresTheMatrix: "check_matrix",
    MasksNoPadding: "check_ragged",
    AnswersInFloat64: "check_edges",
    HidesAWeight: "check_checkpoint",
}


@pytest.mark.parametrize("check", MIXER_CHECKS, ids=lambda check: check.__name__)
def test_a_state_space_model_conforms(check):
    check(Decay)


@pytest.mark.parametrize("faulty", FAULTS, ids=lambda faulty: faulty.__name__)
def test_faults_are_found(faulty):
    (check,) = (check for check in MIXER_CHECKS if check.__name__ == FAULTS[faulty])
    factory = (lambda: faulty(6, n_heads=1)) if issubclass(faulty, Attention) else faulty
    with pytest.raises(AssertionError):
        check(factory)
    with pytest.raises(AssertionError):
        check_mixer(factory)
