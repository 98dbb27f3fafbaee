"""What a call to ssd, its step and its matrix must satisfy, and the sentences that say so when it does not."""

import math
import numbers

import torch
from torch import Tensor

from onchip.ops._sequence import STATE_DTYPES, check_boundaries, check_tensor
from onchip.ops.attention.checks import check_flag
from onchip.ops.ssd.reference import Step


def check_sequence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """The tensors of a call over time fit each other."""
    packed = cu_seqlens is not None
    layout = "(total, heads, head dim), as cu_seqlens is given" if packed else "(batch, time, heads, head dim)"
    _check_inputs("", x, 3 if packed else 4, layout, dt, A, B, C, D, z)
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, x)
    if initial_state is not None:
        states = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _check_state("initial_state", initial_state, x, (states, *x.shape[-2:], B.shape[-1]))


def check_step(
    x_t: Tensor,
    state: Tensor,
    dt_t: Tensor,
    A: Tensor,
    B_t: Tensor,
    C_t: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    out_state: Tensor | None,
) -> None:
    """The tensors of a step fit each other."""
    _check_inputs("_t", x_t, 3, "(batch, heads, head dim)", dt_t, A, B_t, C_t, D, z)
    shape = (*x_t.shape, B_t.shape[-1])
    _check_state("state", state, x_t, shape)
    if out_state is None:
        return
    check_tensor("out_state", out_state, shape, x_t, any_float=True)
    if out_state.dtype != STATE_DTYPES[x_t.dtype]:
        raise TypeError(f"out_state must be {STATE_DTYPES[x_t.dtype]}, as states are, got {out_state.dtype}")


def check_matrix(dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    """The tensors of a matrix fit each other."""
    check_tensor("dt", dt, ("batch", "time", "heads"), dt, any_float=True)
    _check_heads("", A, B, C, dt.shape, B, like=dt)


def _check_inputs(
    suffix: str,
    x: Tensor,
    rank: int,
    layout: str,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x{suffix} must be a tensor, got {type(x).__name__}")
    if x.dtype not in STATE_DTYPES:
        raise TypeError(f"x{suffix} must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.ndim != rank:
        raise ValueError(f"x{suffix} must have {rank} dimensions {layout}, got shape {tuple(x.shape)}")
    if 0 in x.shape[-2:]:
        raise ValueError(f"x{suffix} must have at least one head and a head dim of at least 1, got {tuple(x.shape)}")
    check_tensor(f"dt{suffix}", dt, tuple(x.shape[:-1]), x, any_float=True)
    _check_heads(suffix, A, B, C, x.shape[:-1], x, like=x)
    if D is not None:
        vector = isinstance(D, Tensor) and D.ndim == 1
        check_tensor("D", D, tuple(x.shape[-2:-1] if vector else x.shape[-2:]), x, any_float=True)
    if z is not None:
        check_tensor("z", z, tuple(x.shape), x, any_float=False)


def _check_heads(
    suffix: str, A: Tensor, B: Tensor, C: Tensor, rows_and_heads: tuple[int, ...], x: Tensor, like: Tensor
) -> None:
    """A, B and C; B and C have the dtype of `x`, and all are on the device of `like`."""
    *rows, heads = rows_and_heads
    check_tensor("A", A, (heads,), like, any_float=True)
    check_tensor(f"B{suffix}", B, (*rows, "groups", "state dim"), like, any_float=True)
    groups, state_dim = B.shape[-2:]
    if groups == 0 or heads % groups != 0:
        raise ValueError(f"B{suffix}'s groups must divide the {heads} heads, got {groups}")
    if state_dim == 0:
        raise ValueError(f"B{suffix}'s state dim must be at least 1, got shape {tuple(B.shape)}")
    check_tensor(f"B{suffix}", B, tuple(B.shape), x, any_float=False)
    check_tensor(f"C{suffix}", C, tuple(B.shape), x, any_float=False)


def _check_state(name: str, state: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    check_tensor(name, state, shape, x, any_float=True)
    if state.dtype not in (STATE_DTYPES[x.dtype], x.dtype):
        raise TypeError(f"{name} must be {STATE_DTYPES[x.dtype]} or of x's dtype {x.dtype}, got {state.dtype}")


def step_of(
    dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float] | None, heads: int, like: Tensor
) -> Step:
    """How dt becomes a step, checked."""
    if dt_bias is not None:
        check_tensor("dt_bias", dt_bias, (heads,), like, any_float=True)
    check_flag("dt_softplus", dt_softplus)
    if dt_limit is None:
        return Step(dt_bias, dt_softplus, None)
    if not isinstance(dt_limit, tuple | list) or len(dt_limit) != 2:
        raise ValueError(f"dt_limit must be a pair (low, high) of numbers, got {dt_limit!r}")
    if any(isinstance(x, bool) or not isinstance(x, float | int | numbers.Real) for x in dt_limit):
        raise TypeError(f"dt_limit must be a pair (low, high) of numbers, got {dt_limit!r}")
    low, high = (float(x) for x in dt_limit)
    if not low <= high or low == math.inf or high == -math.inf:
        raise ValueError(f"dt_limit must be (low, high) with low at most high, got ({low}, {high})")
    return Step(dt_bias, dt_softplus, (low, high))


def check_chunk_size(chunk_size: int | None) -> None:
    """chunk_size is a length, or None."""
    if chunk_size is None:
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int | torch.SymInt):
        raise TypeError(f"chunk_size must be an integer or None, got {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
