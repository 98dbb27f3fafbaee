"""HiPPO as a mixer: every channel's history as coefficients in an orthogonal basis, and what is read out of them."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onchip.nn import hippo
from onchip.nn.mixers.base import State
from onchip.nn.mixers.filters import Filters, check_state_size
from onchip.ops._count import check_sizes
from onchip.ops._sequence import sequences

_KEPT = 32  # chunks whose matrices are made, and kept, together


@dataclass(frozen=True, eq=False)
class HiPPOState(State):
    """The coefficients `c (B, d_model, N)`, and how many tokens each row has seen, `seen (B,)` int64."""

    c: Tensor
    seen: Tensor


class HiPPO(Filters[HiPPOState]):
    r"""A memory of fixed dynamics, read by learned weights. For each channel of `x (B, T, d_model)`

        c[t] = A_t c[t-1] + B_t x[t],    out(gelu(C c[t] + D x[t]))

    with A_t and B_t of a HiPPO measure, made discrete. For "legs" they depend on t, by steps of 1/t: all of the history
    is remembered, however long it has become. The other measures have fixed steps.

    In parallel, chunks of `chunk_size` tokens each become one product with matrices that no parameter enters and all
    channels share; these are computed once, in float64.

    Args:
        d_model: features in and out, and channels.
        d_state: coefficients of a channel, N.
        measure: "legs", "legt", "lagt" or "fourier".
        discretization: "bilinear", "backward", or "zoh" where the measure is not "legs". (Forward Euler grows without
            bound while t < N/2.)
        dt: the step where the measure is not "legs": "legt" and "fourier" have windows of 1/dt tokens. None for "legs".
        chunk_size: tokens in a chunk; it changes the speed and nothing else.

    Raises:
        TypeError: a size that is no integer.
        ValueError: an unknown measure, a discretisation that it does not have here, `dt` missing, not positive or out
            of place, a size that is not positive.

    Cost, in parallel: 2·d_model·(N + c)·(N + B) operations a token with c = `chunk_size`, and memory for
    d_model·T·(N + c) numbers where gradients are recorded; the shared matrices of "legs" have N·(N + c) numbers a
    token, and those of the last 512 chunks are kept. A step takes some 10·N operations a channel, for the other
    measures 2·N².

    Source: Gu et al., HiPPO (arXiv 2008.07669). There the memory's input is made by a gated recurrent network; here it
    is the layer's input, so that time can be parallel. C starts normal with variance 1/N.

    >>> import torch
    >>> mixer = HiPPO(16, d_state=8)
    >>> x = torch.randn(2, 10, 16)
    >>> head, state = mixer(x[:, :6], mixer.initial_state(batch=2))
    >>> y_6, state = mixer.step(x[:, 6], state)
    >>> torch.allclose(y_6, mixer(x)[:, 6], atol=1e-5)
    True
    """

    state_type = HiPPOState

    def __init__(
        self,
        d_model: int,
        d_state: int = 32,
        *,
        measure: hippo.Measure = "legs",
        discretization: Literal["bilinear", "backward", "zoh"] = "bilinear",
        dt: float | None = None,
        chunk_size: int = 32,
    ) -> None:
        super().__init__(d_model)
        check_state_size(d_state, even=False)
        hippo.transition(measure, d_state)  # raises where there is none
        known = ("bilinear", "backward") if measure == "legs" else ("bilinear", "backward", "zoh")
        if discretization not in known:
            raise ValueError(f"discretization must be one of {', '.join(known)}, got {discretization!r}")
        if (dt is None) != (measure == "legs") or (dt is not None and not dt > 0):
            raise ValueError(f'dt must be positive, or None with measure "legs", got {dt!r}')
        check_sizes(chunk_size=chunk_size)
        self.d_state, self.measure, self.discretization, self.dt = d_state, measure, discretization, dt
        self.chunk_size = chunk_size
        self.C = nn.Parameter(torch.randn(d_model, d_state) / d_state**0.5)

    def initial_state(self, batch: int) -> HiPPOState:
        """The state of `batch` sequences before their first token."""
        c = torch.zeros(batch, self.d_model, self.d_state, dtype=self._dtype, device=self.D.device)
        return HiPPOState(c, torch.zeros(batch, dtype=torch.int64, device=c.device))

    def _step(self, x_t: Tensor, state: HiPPOState) -> tuple[Tensor, HiPPOState]:
        self._check_state(x_t, state)
        with self._exactly():
            u, seen = x_t.to(self._dtype), state.seen + 1
            if self.measure == "legs":
                c = hippo.legs_update(state.c, u, seen[:, None], self.discretization)
            else:
                move = self._blocks(0, 1, self.chunk_size)[0, 0]
                c = state.c @ move[: self.d_state] + u[..., None] * move[self.d_state]
            y = (c * self.C.to(c.dtype)).sum(-1) + self.D * u
        return self._output(y, x_t), HiPPOState(c, seen)

    def matrix(self, x: Tensor) -> Tensor:
        """What the output owes to each input, `(B, d_model, T, T)`, without D; memory T²·N."""
        T = x.shape[1]
        with self._exactly():
            moves = self._blocks(0, 1, max(T, 1), keep=False)[0]
            inputs = moves[:T, self.d_state : self.d_state + T]  # (T, T, N)
            return torch.einsum("tsn,hn->hts", inputs, self.C.to(self._dtype)).expand(len(x), -1, -1, -1)

    def _parallel(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        u = self._channels(x)
        with self._exactly():
            if cu_seqlens is None:
                y, _ = self._run(u, u.new_zeros(*u.shape[:2], self.d_state), 0)
            else:
                nothing = u.new_zeros(1, self.d_model, self.d_state)
                pieces = [self._run(u[None, :, rows], nothing, 0)[0][0] for rows in sequences(cu_seqlens, len(x))]
                y = torch.cat([u[:, :0], *pieces], dim=-1)
        return self._outputs(y, u, x)

    def _chunk(self, x: Tensor, state: HiPPOState) -> tuple[Tensor, HiPPOState]:
        self._check_state(x, state)
        u, outputs, coefficients, order = self._channels(x), [], [], []
        seen: list[int] = state.seen.tolist() if self.measure == "legs" else [0] * len(x)
        with self._exactly():
            for first in sorted(set(seen)):  # rows that have seen as much have the same matrices
                rows = [row for row, n in enumerate(seen) if n == first]
                y, c = self._run(u[rows], state.c[rows], first)
                outputs.append(y)
                coefficients.append(c)
                order += rows
        back = torch.tensor(order, dtype=torch.int64, device=u.device).argsort()
        y, c = torch.cat([u[:0], *outputs])[back], torch.cat([state.c[:0], *coefficients])[back]
        return self._outputs(y, u, x), HiPPOState(c, state.seen + x.shape[1])

    def _run(self, u: Tensor, c: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """`C c` for the inputs `u (B, d_model, T)` after `first` others, and the last coefficients."""
        if not u.numel():
            return u, c
        C, outputs = self.C.to(c.dtype), []
        for j, piece in enumerate(torch.split(u, self.chunk_size, dim=-1)):
            if j % _KEPT == 0:
                left = -(-(u.shape[-1] - j * self.chunk_size) // self.chunk_size)
                moves = self._blocks(first + j * self.chunk_size, min(left, _KEPT), self.chunk_size)
            if self.measure == "legs" or j == 0:
                move = moves[j % _KEPT]
                readout = torch.einsum("tkn,hn->hkt", move, C)
            T = piece.shape[-1]
            both = torch.cat([c, F.pad(piece, (0, self.chunk_size - T))], dim=-1)  # (B, d_model, N + chunk_size)
            outputs.append(torch.einsum("bhk,hkt->bht", both, readout)[..., :T])
            c = both @ move[T - 1]
        return torch.cat(outputs, dim=-1), c

    def _blocks(self, first: int, blocks: int, length: int, *, keep: bool = True) -> Tensor:
        """`_moves` of this mixer; the matrices of a time-invariant measure are those of its first block."""
        if self.measure != "legs":
            first, blocks = 0, 1
        what = (self.measure, self.d_state, self.discretization, self.dt)
        moves: Tensor = (_kept if keep else _moves)(*what, first, blocks, length, self._dtype, self.D.device)
        return moves

    def _check_state(self, x: Tensor, state: HiPPOState) -> None:
        shape = (len(x), self.d_model, self.d_state)
        if state.c.shape != shape or state.c.dtype != self._dtype:
            got = f"{tuple(state.c.shape)} {state.c.dtype}"
            raise ValueError(f"state must be of the input's rows and of this mixer, {shape} {self._dtype}, got {got}")


def _moves(
    measure: hippo.Measure,
    N: int,
    method: hippo.Method,
    dt: float | None,
    first: int,
    blocks: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`(blocks, length, N + length, N)`: from a block's first coefficients and its inputs to the coefficients in it."""
    with torch.inference_mode(False), torch.no_grad():
        A, B = hippo.transition(measure, N)
        t = torch.arange(first + 1, first + blocks * length + 1, dtype=torch.float64, device="cpu")
        A, B = hippo.discretize(A, B, 1 / t if dt is None else torch.full_like(t, dt), method)
        if dt is None and first == 0:  # the first input is a constant history
            A[0], B[0], B[0, 0] = 0, 0, 1
        A, B = A.reshape(blocks, length, N, N), B.reshape(blocks, length, N)
        move = torch.eye(N + length, N, dtype=torch.float64, device="cpu").repeat(blocks, 1, 1)
        moves = []
        for i in range(length):
            move = move @ A[:, i].mT
            move[:, N + i] = B[:, i]
            moves.append(move.to(device, dtype))
        return torch.stack(moves, dim=1)


_cached = lru_cache(maxsize=16)(_moves)


def _kept(*what: Any) -> Tensor:
    """`_moves`, made once; to torch.compile a constant."""
    return _cached(*what)


# What torch.compiler.assume_constant_result does, which would load all of the compiler, and Triton with it.
_kept._dynamo_marked_constant = True  # type: ignore[attr-defined]
