"""The kernels' launches: which tiles, which grids, and what goes into a buffer of its own."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from onchip.ops._triton import Launch
from onchip.ops.attention.triton.arguments import padded, precision
from onchip.ops.ssd.call import Call
from onchip.ops.ssd.triton.arguments import Chunks, Steps, divide, rows
from onchip.ops.ssd.triton.gradients import chunk_gradients
from onchip.ops.ssd.triton.outputs import chunk_outputs, one_step
from onchip.ops.ssd.triton.states import chunk_states, pass_states

_LONGEST = 64  # steps of a chunk: a tile of the matrix units, and its decays fit in registers
_LONGEST_BACKWARD = 32  # where more is alive at once
_COLUMNS = 64  # of the state dim at a time
_GRADIENT_COLUMNS = 32  # where more would spill out of the registers
_PASSED = 512  # numbers of a state that a program passes on
_STEPPED = 8  # rows of a state that a program of a step takes


class Plan(NamedTuple):
    """A call, its chunks, and what the kernels know when they are compiled."""

    call: Call
    steps: Steps
    chunks: Chunks
    number: int
    size: int

    @classmethod
    def of(cls, call: Call, longest: int = _LONGEST) -> "Plan":
        """Of a call, whose boundaries are read here."""
        wanted = min(call.chunk_size or longest, longest)
        size = max(16, triton.next_power_of_2(wanted + 1) // 2)
        return cls(call, _steps(call), *divide(call.x, call.cu_seqlens, size), size)

    @classmethod
    def of_backward(cls, call: Call) -> "Plan":
        """The same for the backward pass."""
        return cls.of(call, _LONGEST_BACKWARD)

    @property
    def packed(self) -> bool:
        """Whether rows have no batch."""
        return self.call.cu_seqlens is not None

    def tiles(self, columns: int = _COLUMNS) -> tuple[Any, ...]:
        """The kernels' last arguments."""
        dim, state = self.call.states[2:]
        sizes = (self.call.x.shape[-2] // self.call.B.shape[-2], dim, state, self.size)
        blocks = (padded(dim), min(columns, padded(state)))
        return (self.call.dt_softplus, precision(self.call.x.dtype), *sizes, *blocks)

    def rows(self, x: Tensor | None) -> Any:
        """A tensor over time as the kernels take it."""
        return rows(x, packed=self.packed)

    def new_states(self) -> tuple[Tensor, Tensor]:
        """A state for every chunk, and what is left of one at its end."""
        heads, dim, state = self.call.states[1:]
        return self.empty(self.number, heads, dim, state), self.empty(self.number, heads)

    def empty(self, *shape: int) -> Tensor:
        """Uninitialised float32."""
        return torch.empty(shape, dtype=torch.float32, device=self.call.x.device)


class Partial(NamedTuple):
    """Gradients of which sums are to be taken: B's and C's per head; A's and dt_bias's, and D's, per chunk and head."""

    B: Tensor
    C: Tensor
    sums: Tensor
    D: Tensor

    @classmethod
    def of(cls, plan: Plan) -> "Partial":
        """Of a plan."""
        shape = (*plan.call.x.shape[:-1], plan.call.B.shape[-1])
        heads, dim = plan.call.x.shape[-2:]
        skip = plan.empty(plan.number, heads, dim) if plan.call.D is not None else plan.empty(0)
        return cls(plan.empty(*shape), plan.empty(*shape), plan.empty(plan.number, heads, 2), skip)


def forward(plan: Plan, out: Tensor, final: Tensor) -> list[Launch]:
    """The states of the chunks, their passing, and the outputs."""
    call, states = plan.call, plan.new_states()
    outputs = (
        *map(plan.rows, (call.x, call.B, call.C)), _skip(call), plan.rows(call.z), plan.steps, plan.chunks, states[0],
        plan.rows(out), call.x.shape[-2], *plan.tiles(),
    )  # fmt: skip
    return [
        _chunk_states(plan, call.x, None, call.B, states, backward=False),
        _pass_states(plan, states, call.initial_state, final, backward=False),
        Launch(chunk_outputs, (plan.number, call.x.shape[-2]), outputs, warps=4, stages=2),
    ]


def backward(
    plan: Plan, grad_out: Tensor, grad_state: Tensor | None, grads: tuple[Tensor, ...], partial: Partial
) -> list[Launch]:
    """The states once more, their gradients from the last chunk to the first, and those of the inputs."""
    call, states, grad_states = plan.call, plan.new_states(), plan.new_states()
    grad_x, grad_dt, _, _, _, _, grad_z, _, grad_initial = grads
    gradients = (
        *map(plan.rows, (call.x, call.B, call.C)), _skip(call), plan.rows(call.z), plan.steps, plan.chunks,
        plan.rows(grad_out), states[0], grad_states[0], call.x.shape[-2],
        *map(plan.rows, (grad_x, grad_dt, partial.B, partial.C, None if call.z is None else grad_z)), partial.sums,
        partial.D, *plan.tiles(_GRADIENT_COLUMNS),
    )  # fmt: skip
    return [
        _chunk_states(plan, call.x, None, call.B, states, backward=False),
        _pass_states(plan, states, call.initial_state, None, backward=False),
        _chunk_states(plan, grad_out, call.z, call.C, grad_states, backward=True),
        _pass_states(
            plan, grad_states, grad_state, None if call.initial_state is None else grad_initial, backward=True
        ),
        Launch(chunk_gradients, (plan.number, call.x.shape[-2]), gradients, warps=4),
    ]


def _chunk_states(
    plan: Plan, left: Tensor, gate: Tensor | None, right: Tensor, states: tuple[Tensor, Tensor], *, backward: bool
) -> Launch:
    heads, tiles = left.shape[-2], plan.tiles()
    given = (plan.rows(left), plan.rows(gate), plan.rows(right), plan.steps, plan.chunks, *states, heads)
    return Launch(
        chunk_states, (plan.number, heads, triton.cdiv(right.shape[-1], tiles[-1])), (*given, backward, *tiles)
    )


def _pass_states(
    plan: Plan, states: tuple[Tensor, Tensor], initial: Tensor | None, final: Tensor | None, *, backward: bool
) -> Launch:
    count, heads, dim, state = plan.call.states
    given = (*states, plan.chunks, rows(initial), rows(final), heads)
    return Launch(
        pass_states, (triton.cdiv(dim * state, _PASSED), heads, count), (*given, backward, dim, state, _PASSED)
    )


def step(call: Call, out_state: Tensor, y: Tensor) -> Launch:
    """A step; the tensors over time hold one."""
    batch, _, heads, dim = call.x.shape
    group, state = heads // call.B.shape[-2], call.B.shape[-1]
    columns = min(128, padded(state))
    given = (*map(rows, (call.x, call.B, call.C)), _skip(call), rows(call.z), _steps(call))
    sizes = (call.dt_softplus, group, dim, state, _STEPPED, columns)
    results = (rows(call.initial_state), rows(out_state), rows(y))
    return Launch(one_step, (batch, heads, triton.cdiv(dim, _STEPPED)), (*given, *results, *sizes))


def _steps(call: Call) -> Steps:
    dt = rows(call.dt, packed=call.cu_seqlens is not None)
    A, bias = (None if x is None else x.to(torch.float32).contiguous() for x in (call.A, call.dt_bias))
    return Steps(call.dt, dt.a, dt.b, dt.c, A, bias, call.dt_low, call.dt_high)


def _skip(call: Call) -> Any:
    return rows(None if call.D is None else call.D.to(torch.float32))
