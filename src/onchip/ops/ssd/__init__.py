"""State space duality, Mamba-2's mixer: the public functions."""

from typing import Literal, overload

import torch
from torch import Tensor

from onchip.ops import _select, _step, _triton
from onchip.ops._library import needs_grad
from onchip.ops._sequence import WithFinalState, warn_of_growth
from onchip.ops.attention.checks import check_flag
from onchip.ops.ssd import checks, cpu, op, reference

Backend = Literal["cpu", "triton", "reference"]

TRITON_MAX_DIM = 128


def _triton_limits(x: Tensor, *more: Tensor) -> str | None:
    # Here and not beside the kernels, which are not imported before one of them runs.
    if x.shape[-1] > TRITON_MAX_DIM:
        return f"the head dim goes to {TRITON_MAX_DIM}, got {x.shape[-1]}"
    if x.dtype == torch.float64:
        return "it computes in float32, and the call is in float64"
    return _triton.limits(x.device)


IMPLEMENTATIONS = (
    _select.Implementation("cpu", cpu.limits, devices=("cpu", "meta")),
    _select.Implementation("triton", _triton_limits, _triton.DEVICES, on_request=_triton.interpreted_on()),
    _select.Implementation("reference"),
)


@overload
def ssd(
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
    dt_limit: tuple[float, float] | None = None,
    chunk_size: int | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor: ...
@overload
def ssd(
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
    dt_limit: tuple[float, float] | None = None,
    chunk_size: int | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    backend: Backend | None = None,
) -> WithFinalState: ...
def ssd(
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
    dt_limit: tuple[float, float] | None = None,
    chunk_size: int | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor | WithFinalState:
    r"""State space duality: a scalar decay per head, a state of P × N numbers, computed as matrix products.

    For head h, which reads group h // (H / G) of B and C:

        s[t] = clamp(softplus(dt[t] + dt_bias), *dt_limit)          (each only where it is asked for)
        S[t] = exp(s[t] · A) · S[t-1] + s[t] · x[t] ⊗ B[t]          S[-1] = initial_state, or 0
        y[t] = S[t] C[t] + D · x[t]
        out[t] = y[t] · silu(z[t])

    Without D and z, out = M x with the matrix M[i, j] = (C[i] · B[j]) · exp(A · Σ_{j<k≤i} s[k]) · s[j] for j ≤ i.

    Args:
        x: `(B, T, H, P)`, or `(total, H, P)` with `cu_seqlens`; float64, float32, bfloat16 or float16; any strides.
        dt: `(B, T, H)` or `(total, H)`, floating: the time each step takes.
        A: `(H,)`, floating: the rate of each head; negative for a state that decays. Where an entry is positive the
            first such call warns; on a GPU only the first call looks.
        B: `(B, T, G, N)` or `(total, G, N)`, in x's dtype; G divides H.
        C: as B.
        D: `(H,)` or `(H, P)`, floating: how much of x goes straight to the output.
        z: as x: the gate.
        dt_bias: `(H,)`, floating.
        dt_softplus: take the softplus of dt + dt_bias (which is linear above 20, as PyTorch's).
        dt_limit: `(low, high)`: clamp the step to this range, as `torch.clamp` does.
        chunk_size: how many steps of time to take in one matrix product, at least 1; T need not be a multiple. The
            result does not depend on it beyond rounding, and kernels may take fewer at a time. By default each
            implementation's own.
        initial_state: `(B, H, P, N)`, or `(sequences, H, P, N)` with `cu_seqlens`; in the state's dtype or x's.
        return_final_state: return the state after the last step, too.
        cu_seqlens: `(sequences + 1,)` int32 or int64, from 0 to total, not descending: sequence i is rows
            `cu_seqlens[i]:cu_seqlens[i + 1]`, and begins with its own state.
        backend: "cpu", "triton" or "reference" asks for an implementation and raises where it cannot serve; by default
            the fastest that can. See `onchip.explain`.

    Returns:
        `out` in x's shape and dtype, contiguous; with `return_final_state` the named tuple `(out, final_state)`, the
        state float32 (float64 for float64) in the shape of `initial_state`. A call that continues from it gives what
        one call over both stretches of time gives.

    Raises:
        ValueError: shapes, boundaries or values that do not fit, naming the argument, what was expected and what came.
        TypeError: dtypes or devices that do not fit.

    Numerics: steps, decays, states and sums are float32 (float64 for float64), whatever the inputs' dtypes. Decays are
    exponentials of sums over their own segment of time, never of differences of longer sums, which cancel.
    Cost: with chunks of Q steps 2·B·T·H·(2·P·N + Q/2·(P + N)) operations; memory linear in T. Differentiable in all
    floating arguments, through both results.

    Source: Dao and Gu, Transformers are SSMs (arXiv 2405.21060, §6 and listing 1). As in their package B is multiplied
    by the step itself and not by its zero-order hold. Here the initial state has a gradient, and the final one too.

    >>> import torch, onchip
    >>> x, dt, A = torch.randn(2, 100, 4, 16), torch.rand(2, 100, 4), -torch.rand(4)
    >>> B, C = torch.randn(2, 2, 100, 1, 8).unbind(0)
    >>> out = onchip.ssd(x, dt, A, B, C)
    >>> first, state = onchip.ssd(x[:, :70], dt[:, :70], A, B[:, :70], C[:, :70], return_final_state=True)
    >>> rest = onchip.ssd(x[:, 70:], dt[:, 70:], A, B[:, 70:], C[:, 70:], initial_state=state)
    >>> torch.allclose(out, torch.cat([first, rest], 1), atol=1e-4)
    True
    """
    checks.check_sequence(x, dt, A, B, C, D, z, initial_state, cu_seqlens)
    step = checks.step_of(dt_bias, dt_softplus, dt_limit, x.shape[-2], x)
    checks.check_chunk_size(chunk_size)
    check_flag("return_final_state", return_final_state)
    warn_of_growth(A)
    if _select.choose("ssd", IMPLEMENTATIONS, backend, x, dt, A, B, C) == "reference":
        result = reference.ssd(x, dt, A, B, C, D, z, step, chunk_size, initial_state, cu_seqlens)
    else:
        tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
        result = op.ssd(*tensors, step.softplus, *step.range, chunk_size, backend)
    return WithFinalState(*result) if return_final_state else result[0]


def ssd_step(
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
    dt_limit: tuple[float, float] | None = None,
    out_state: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One step of `ssd`, for decoding: the state goes in, and the next one comes out.

        s = clamp(softplus(dt_t + dt_bias), *dt_limit)              (each only where it is asked for)
        state ← exp(s · A) · state + s · x_t ⊗ B_t
        y = (state C_t + D · x_t) · silu(z)

    Args:
        x_t: `(B, H, P)`; float64, float32, bfloat16 or float16; any strides.
        state: `(B, H, P, N)`, as `ssd` returns it, or in x_t's dtype.
        dt_t: `(B, H)`, floating.
        A: `(H,)`, floating.
        B_t: `(B, G, N)`, in x_t's dtype; G divides H.
        C_t: as B_t.
        D: `(H,)` or `(H, P)`, floating.
        z: as x_t: the gate.
        dt_bias: `(H,)`, floating.
        dt_softplus: take the softplus of dt_t + dt_bias.
        dt_limit: `(low, high)`: clamp the step to this range.
        out_state: where to write the new state, in the dtype and shape that states have; it may be `state` itself,
            which is then updated in place. Without it the new state is a new tensor, and `state` stays what it was.
        backend: as for `ssd`.

    Returns:
        y, in x_t's shape and dtype, and the new state, which is `out_state` where that is given.

    Raises:
        ValueError: shapes or values that do not fit, naming the argument, what was expected and what came; or
            `out_state` where a gradient is asked for.
        TypeError: dtypes or devices that do not fit.

    Numerics: as for `ssd`.
    Cost: 5·B·H·P·N operations; the state is read once and written once, and nothing else is large.
    Differentiable in all floating arguments, except into `out_state`.

    Source: Dao and Gu, Transformers are SSMs (arXiv 2405.21060, §3).

    >>> import torch, onchip
    >>> x, dt, A = torch.randn(2, 3, 4, 16), torch.rand(2, 3, 4), -torch.rand(4)
    >>> B, C = torch.randn(2, 2, 3, 1, 8).unbind(0)
    >>> state = torch.zeros(2, 4, 16, 8)
    >>> for t in range(3):
    ...     y, state = onchip.ssd_step(x[:, t], state, dt[:, t], A, B[:, t], C[:, t], out_state=state)
    >>> torch.allclose(y, onchip.ssd(x, dt, A, B, C)[:, -1], atol=1e-5)
    True
    """
    tensors = (x_t, state, dt_t, A, B_t, C_t, D, z, dt_bias)
    if _step.direct(backend, *tensors):
        y, new = torch.empty_like(x_t), torch.empty_like(state) if out_state is None else out_state
        if _step.kernels.try_ssd_step(*tensors, dt_softplus, dt_limit, y, new, torch.get_num_threads()):
            _step.changed(new)
            return y, new
    checks.check_step(x_t, state, dt_t, A, B_t, C_t, D, z, out_state)
    step = checks.step_of(dt_bias, dt_softplus, dt_limit, x_t.shape[-2], x_t)
    _step.check_writable(out_state, *tensors)
    inputs = (x_t, state, dt_t, A, B_t, C_t, D, z)
    chosen = _select.choose("ssd_step", IMPLEMENTATIONS, backend, *inputs[:6])
    if chosen != "reference" and not needs_grad(tensors):
        return op.ssd_step(*inputs, dt_bias, step.softplus, *step.range, backend, out_state=out_state)
    y, new_state = reference.ssd_step(*inputs, step)
    return y, new_state if out_state is None else out_state.copy_(new_state)


def ssd_matrix(
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
) -> Tensor:
    r"""The matrix that `ssd` applies to x along time, one for each head; without D and z.

        M[i, j] = (C[i] · B[j]) · exp(A · Σ_{j<k≤i} s[k]) · s[j]  for j ≤ i, else 0,
        s[t] = clamp(softplus(dt[t] + dt_bias), *dt_limit)         (each only where it is asked for)

    Args:
        dt: `(B, T, H)`, floating.
        A: `(H,)`, floating.
        B: `(B, T, G, N)`, floating; G divides H.
        C: as B, in B's dtype.
        dt_bias: `(H,)`, floating.
        dt_softplus: take the softplus of dt + dt_bias.
        dt_limit: `(low, high)`: clamp the step to this range.

    Returns:
        `(B, H, T, T)`, float32 (float64 for float64 B and C).

    Raises:
        ValueError: shapes or values that do not fit, naming the argument, what was expected and what came.
        TypeError: dtypes or devices that do not fit.

    Numerics: as for `ssd`.
    Cost: quadratic in T, in time and memory: for people and tests. Differentiable in all floating arguments.

    Source: Dao and Gu, Transformers are SSMs (arXiv 2405.21060, §3.2: a 1-semiseparable mask on C Bᵀ).

    >>> import torch, onchip
    >>> x, dt, A = torch.randn(1, 9, 4, 16), torch.rand(1, 9, 4), -torch.rand(4)
    >>> B, C = torch.randn(2, 1, 9, 2, 8).unbind(0)
    >>> y = torch.einsum("bhij,bjhp->bihp", onchip.ssd_matrix(dt, A, B, C), x)
    >>> torch.allclose(y, onchip.ssd(x, dt, A, B, C), atol=1e-4)
    True
    """
    checks.check_matrix(dt, A, B, C)
    step = checks.step_of(dt_bias, dt_softplus, dt_limit, dt.shape[-1], dt)
    return reference.ssd_matrix(dt, A, B, C, step)


_select.register(ssd, IMPLEMENTATIONS, tensors=5)
_select.register(ssd_step, IMPLEMENTATIONS, tensors=6)
