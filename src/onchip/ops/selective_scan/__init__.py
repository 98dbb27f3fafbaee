"""The selective scan of Mamba: the public functions."""

from typing import Literal, overload

import torch
from torch import Tensor

from onchip.ops import _select, _step, _triton
from onchip.ops._sequence import STATE_DTYPES, WithFinalState, check_tensor, warn_of_growth
from onchip.ops.attention.checks import check_flag
from onchip.ops.selective_scan import checks, cpu, op, reference, step
from onchip.ops.selective_scan.arguments import Call

Backend = Literal["cpu", "triton", "reference"]

TRITON_MAX_STATES = 256
WIDE = frozenset(STATE_DTYPES.values())


def _triton_limits(x: Tensor, *more: Tensor) -> str | None:
    # Here and not beside the kernels, which are not imported before one of them runs.
    if x.dtype == torch.float64:
        return "it computes in float32, and the call is in float64"
    if more and more[1].shape[1] > TRITON_MAX_STATES:
        return (
            f"it holds a channel's states in registers, up to {TRITON_MAX_STATES}, and the call has {more[1].shape[1]}"
        )
    return _triton.limits(x.device)


IMPLEMENTATIONS = (
    _select.Implementation("cpu", cpu.limits, devices=("cpu", "meta")),
    _select.Implementation("triton", _triton_limits, _triton.DEVICES, on_request=_triton.interpreted_on()),
    _select.Implementation("reference"),
)


@overload
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor: ...


@overload
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor | WithFinalState: ...


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor | WithFinalState:
    r"""The selective state space recurrence of Mamba, for every channel d with a state h of N numbers.

        δ_t = softplus(dt_t + dt_bias)              or dt_t + dt_bias without dt_softplus
        h_t = exp(δ_t A) ∘ h_{t-1} + δ_t x_t B_t
        y_t = (C_t · h_t + D x_t) · silu(z_t)       without D or z the term or the factor is left out

    Args:
        x: `(B, T, D)`, or `(total, D)` with `cu_seqlens`; float64, float32, bfloat16 or float16. Any strides, here and
            below, and any of these dtypes for every other tensor.
        dt: as x; the step of time.
        A: `(D, N)`, real; negative for a state that decays. Where an entry is positive the first such call warns; on a
            GPU only the first call looks.
        B, C: `(B, T, G, N)`, or `(total, G, N)`: what goes into the state and out of it, G dividing D; channel d
            belongs to group d // (D / G).
        D: `(D,)`; the weight of x in the output.
        z: as x; the gate.
        dt_bias: `(D,)`; added to dt.
        dt_softplus: take the softplus of dt + dt_bias, which is itself from 20 on, as PyTorch's.
        initial_state: `(B, D, N)`, or `(sequences, D, N)`: h before the first token, in float32 or x's dtype (float64
            where x is); zeros by default.
        return_final_state: also return h after the last token.
        cu_seqlens: `(sequences + 1,)` int32 or int64, from 0 to total without descending: where each packed sequence
            begins. Each begins with its own initial state.
        backend: "cpu", "triton" or "reference" asks for an implementation and raises where it cannot serve; by default
            the fastest that can. See `onchip.explain`. The kernels in Triton go to N = 256.

    Returns:
        The output, as x; with `return_final_state` a named tuple `(out, final_state)`, the state in float32 (float64
        where x is), to be handed to the next call or to `selective_scan_step`: a split at any point equals one pass.

    Raises:
        ValueError: shapes or values that do not fit, naming the argument, what was expected and what came.
        TypeError: dtypes or devices that do not fit; complex A, B or C.

    Numerics: everything is computed and carried in float32 (float64 where x is), and rounded once, to x's dtype, at the
    end. Gradients with respect to every tensor, through the output and the final state, each in its tensor's dtype.
    Cost: per channel, token and state one exponential and some six operations, which is the floor on a CPU; x, dt, z, B
    and C are read once and the output written once. Backward some three times that, from a state saved for every 32
    tokens. Time and memory are linear in T. The same bits on every run; on a CPU, on any number of threads too.

    Source: Gu and Dao, Mamba (arXiv 2312.00752, eq. 2 and algorithm 2), with B discretised as δB and not by zero-order
    hold, as in the authors' code. Theirs takes no initial state, drops the final state's gradient, and also takes
    complex A, B and C, which this does not.

    >>> import torch, onchip
    >>> x, dt = torch.randn(2, 1, 100, 8).unbind(0)  # (batch, time, channels)
    >>> A = -torch.rand(8, 4)
    >>> B, C = torch.randn(2, 1, 100, 1, 4).unbind(0)  # (batch, time, groups, d_state)
    >>> y, h = onchip.selective_scan(x, dt, A, B, C, dt_softplus=True, return_final_state=True)
    >>> y.shape, h.shape
    (torch.Size([1, 100, 8]), torch.Size([1, 8, 4]))
    """
    checks.check_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens)
    check_flag("return_final_state", return_final_state)
    warn_of_growth(A)
    call = Call(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus)
    if _select.choose("selective_scan", IMPLEMENTATIONS, backend, x, dt, A, B, C) == "reference":
        out, final_state = reference.selective_scan(*call)
    else:
        out, final_state, _ = op.selective_scan(call, backend)
    return WithFinalState(out, final_state) if return_final_state else out


def selective_scan_step(
    x_t: Tensor,
    state: Tensor,
    dt_t: Tensor,
    A: Tensor,
    B_t: Tensor,
    C_t: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    out_state: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One token of `selective_scan`: the step of decoding.

        h' = exp(δ A) ∘ h + δ x B,    y = (C · h' + D x) · silu(z)

    Args:
        x_t, dt_t, z: `(B, D)`, one token of each of B sequences; dtypes as of `selective_scan`.
        state: `(B, D, N)`: h, as `selective_scan` or the step before returned it; float32 or x_t's dtype (float64 where
            x_t is).
        A, D, dt_bias, dt_softplus: as of `selective_scan`.
        B_t, C_t: `(B, G, N)`.
        out_state: where to write h', of state's shape and one of its dtypes; it may be `state` itself, which is then
            updated in place. By default h' is a new tensor, in float32 (float64). Not where a gradient is asked for.
        backend: as of `selective_scan`.

    Returns:
        `(y_t, state)`: the output, `(B, D)` in x_t's dtype, and h'.

    Raises:
        ValueError: shapes or values that do not fit, naming the argument, what was expected and what came.
        TypeError: dtypes or devices that do not fit.

    Numerics and source: as of `selective_scan`. Cost: B·D·N exponentials; the state is read once and written once.
    Where a gradient is asked for, the reference runs.

    >>> import torch, onchip
    >>> x, dt, B, C = torch.randn(2, 8), torch.rand(2, 8), torch.randn(2, 1, 4), torch.randn(2, 1, 4)
    >>> h = torch.zeros(2, 8, 4)
    >>> y, h = onchip.selective_scan_step(x, h, dt, -torch.rand(8, 4), B, C)
    >>> y.shape, h.shape
    (torch.Size([2, 8]), torch.Size([2, 8, 4]))
    """
    tensors = (x_t, state, dt_t, A, B_t, C_t, D, z, dt_bias)
    in_place = out_state is state or (out_state is None and isinstance(state, Tensor) and state.dtype in WIDE)
    if in_place and _step.direct(backend, *tensors):
        y_t, new = torch.empty_like(x_t), state.clone() if out_state is None else state
        if _step.kernels.try_selective_scan_step(x_t, new, *tensors[2:], dt_softplus, y_t, torch.get_num_threads()):
            _step.changed(new)
            return y_t, new
    checks.check_step(x_t, state, dt_t, A, B_t, C_t, D, z, dt_bias, dt_softplus, out_state)
    _step.check_writable(out_state, *tensors)
    in_reference = _select.choose("selective_scan_step", IMPLEMENTATIONS, backend, x_t, dt_t, A) == "reference"
    if in_reference or _step.differentiated(*tensors):
        y_t, new = reference.selective_scan_step(*tensors, dt_softplus)
        return y_t, new if out_state is None else out_state.copy_(new)
    new = state if out_state is state else state.to(STATE_DTYPES[x_t.dtype], copy=True)
    y_t = step.step(x_t, new, *tensors[2:], dt_softplus, backend)
    return y_t, new if out_state is None or out_state is new else out_state.copy_(new)


def selective_scan_matrix(
    dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, dt_bias: Tensor | None = None, dt_softplus: bool = False
) -> Tensor:
    r"""The matrices M that `selective_scan` applies to x along time, one per channel: without D and z, y = M x.

        M[i, j] = Σ_n C_i[n] exp(A[n] Σ_{j<k≤i} δ_k) B_j[n] δ_j    for j ≤ i, else 0

    Args:
        dt, A, B, C, dt_bias, dt_softplus: as of `selective_scan`, not packed.

    Returns:
        `(B, D, T, T)` in float32, float64 where dt is.

    Raises:
        ValueError, TypeError: as `selective_scan`.

    Numerics: the sums in the exponent are each summed by themselves, over a mask; differences of one running sum would
    lose their digits. Cost: N exponentials per entry, and a few matrices of memory. Differentiable.

    Source: Dao and Gu, Mamba-2 (arXiv 2405.21060, eq. 3): the semiseparable matrix of a state space model.

    >>> import torch, onchip
    >>> x, dt, A = torch.randn(1, 6, 3), torch.rand(1, 6, 3), -torch.rand(3, 2)
    >>> B, C = torch.randn(2, 1, 6, 1, 2).unbind(0)
    >>> M = onchip.selective_scan_matrix(dt, A, B, C)
    >>> y = torch.einsum("bdij,bjd->bid", M, x)
    >>> torch.allclose(y, onchip.selective_scan(x, dt, A, B, C), atol=1e-5)
    True
    """
    check_tensor("dt", dt, ("batch", "time", "channels"), dt, any_float=True)
    checks.check_scan(dt, dt, A, B, C, None, None, dt_bias, dt_softplus, None, None)
    return reference.selective_scan_matrix(dt, A, B, C, dt_bias, dt_softplus)


_select.register(selective_scan, IMPLEMENTATIONS, tensors=5)
_select.register(selective_scan_step, IMPLEMENTATIONS, tensors=1)
