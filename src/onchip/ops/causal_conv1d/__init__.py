"""The short causal convolution of each channel: the public functions."""

from typing import Literal, overload

import torch
from torch import Tensor

from onchip.ops import _select, _step, _triton
from onchip.ops._sequence import WithFinalState
from onchip.ops.attention.checks import check_flag
from onchip.ops.causal_conv1d import checks, cpu, op, reference, step
from onchip.ops.causal_conv1d.checks import Activation

Backend = Literal["cpu", "triton", "reference"]


def _triton_limits(x: Tensor) -> str | None:
    # Here and not beside the kernels, which are not imported before they run.
    if x.dtype == torch.float64:
        return "it computes in float32, and the call is in float64"
    return _triton.limits(x.device)


IMPLEMENTATIONS = (
    _select.Implementation("cpu", cpu.limits, devices=("cpu", "meta")),
    _select.Implementation("triton", _triton_limits, _triton.DEVICES, on_request=_triton.interpreted_on()),
    _select.Implementation("reference"),
)


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    initial_state: Tensor | None = None,
    return_final_state: bool,
    cu_seqlens: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor | WithFinalState: ...
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor | WithFinalState:
    r"""Each channel convolved with a short filter of its own, looking back only.

        y[t] = act( bias + Σ_w weight[:, w] ∘ x[t - (W - 1) + w] ),    w = 0 … W - 1

    Inputs before the first are the `initial_state`'s, or zero. The state is the last W - 1 inputs, oldest first: what
    a call returns is what the next one, or `causal_conv1d_step`, goes on from, and a split at any point is one pass.

    Args:
        x: `(B, T, D)`, or `(total, D)` with `cu_seqlens`; float64, float32, bfloat16 or float16; any strides.
        weight: `(D, W)`, W ≥ 1; any of these dtypes, whatever x's. The last tap is the one on the present.
        bias: `(D,)`, any of these dtypes.
        activation: "silu" (also called "swish") or None.
        initial_state: `(B, W - 1, D)`, packed `(sequences, W - 1, D)`, in x's dtype, as it holds inputs.
        return_final_state: also return the state after the last input, shaped as `initial_state`.
        cu_seqlens: `(sequences + 1,)` int32 or int64, the boundaries of packed sequences, from 0 to total. None of them
            sees another.
        backend: "cpu", "triton" or "reference" asks for an implementation and raises where it cannot serve; by default
            the fastest that can. See `onchip.explain`.

    Returns:
        y, of x's shape and dtype; with `return_final_state` a `WithFinalState(out, final_state)`. Where x's time is
        contiguous, as in a transposed `(B, D, T)`, y's is, too; otherwise y is contiguous.

    Raises:
        ValueError: shapes or values that do not fit, naming the argument, what was expected and what came.
        TypeError: dtypes or devices that do not fit.

    Numerics: sums in float32 (float64 for float64), rounded once to x's dtype. Gradients with respect to every tensor,
    also through the final state; those of weight and bias are summed in one order: the same bits on every run.
    Cost: 2·W FLOPs an element, without the activation. The floor is x read once and y written once; of the backward
    pass, x and y's gradient read and x's written.

    Source: Gu & Dao, Mamba (arXiv 2312.00752, §3.4), whose layer it precedes, and Fu et al., H3 (arXiv 2212.14052), as
    the shift matrix's state space. Their kernels serve W 2 to 4 and return no gradient through a packed call's state.

    >>> import torch, onchip
    >>> x, weight = torch.randn(2, 9, 4), torch.randn(4, 3)
    >>> whole = onchip.causal_conv1d(x, weight, activation="silu")
    >>> first, state = onchip.causal_conv1d(x[:, :5], weight, activation="silu", return_final_state=True)
    >>> second = onchip.causal_conv1d(x[:, 5:], weight, activation="silu", initial_state=state)
    >>> torch.allclose(whole, torch.cat([first, second], 1))
    True
    """
    silu = checks.check(x, weight, bias, activation, initial_state, cu_seqlens)
    check_flag("return_final_state", return_final_state)
    tensors = (x, weight, bias, initial_state, cu_seqlens)
    if _select.choose("causal_conv1d", IMPLEMENTATIONS, backend, x) == "reference":
        out, final_state = reference.causal_conv1d(*tensors, silu)
    else:
        out, final_state = op.causal_conv1d(*tensors, silu, return_final_state, backend)
    return WithFinalState(out, final_state) if return_final_state else out


def causal_conv1d_step(
    x_t: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    out_state: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `causal_conv1d`: the present's output, and the state that the next step takes.

        y_t = act( bias + Σ_{w<W-1} weight[:, w] ∘ state[w] + weight[:, W - 1] ∘ x_t ),    state ← (state[1:], x_t)

    Args:
        x_t: `(B, D)`, the present input; any strides.
        state: `(B, W - 1, D)`, the inputs before it, oldest first, in x_t's dtype; not changed.
        weight, bias, activation, backend: as in `causal_conv1d`.
        out_state: where the new state is written, for decoding without allocation; `state` itself updates it in place.
            Not where a gradient is asked for.

    Returns:
        `(y_t, new state)`, `(B, D)` and `(B, W - 1, D)`; the latter is `out_state` where that is given.

    Raises:
        ValueError, TypeError: as `causal_conv1d`.

    Numerics and source: `causal_conv1d`'s. Cost: state and weight are read once, the state is written once.

    >>> import torch, onchip
    >>> x, weight = torch.randn(2, 5, 4), torch.randn(4, 3)
    >>> state = torch.zeros(2, 2, 4)
    >>> for t in range(5):
    ...     y_t, state = onchip.causal_conv1d_step(x[:, t], state, weight)
    >>> torch.allclose(y_t, onchip.causal_conv1d(x, weight)[:, -1], atol=1e-6)
    True
    """
    known = activation is None or activation == "silu" or activation == "swish"
    in_place = out_state is None or out_state is state
    if known and in_place and _step.direct(backend, x_t, state, weight, bias):
        y_t, new = x_t.new_empty(x_t.shape), state.clone() if out_state is None else state
        silu, threads = activation is not None, torch.get_num_threads()
        if _step.kernels.try_causal_conv1d_step(x_t, new, weight, bias, silu, y_t, threads):
            _step.changed(new)
            return y_t, new
    silu = checks.check_step(x_t, state, weight, bias, activation, out_state)
    _step.check_writable(out_state, x_t, state, weight, bias)
    in_reference = _select.choose("causal_conv1d_step", IMPLEMENTATIONS, backend, x_t) == "reference"
    if in_reference or _step.differentiated(x_t, state, weight, bias):
        y_t, new = reference.step(x_t, state, weight, bias, silu)
        return y_t, new if out_state is None else out_state.copy_(new)
    new = state if out_state is state else state.clone()
    y_t = step.step(x_t, new, weight, bias, silu, backend)
    return y_t, new if out_state is None or out_state is new else out_state.copy_(new)


def causal_conv1d_matrix(weight: Tensor, length: int) -> Tensor:
    """The T×T matrix of each channel that `causal_conv1d` multiplies x by, before bias and activation.

        M[d, t, s] = weight[d, W - 1 - (t - s)] where 0 ≤ t - s < W, else 0

    Args:
        weight: `(D, W)`, W ≥ 1, floating.
        length: T, at least 0.

    Returns:
        `(D, T, T)`, in weight's dtype, Toeplitz and lower triangular with W diagonals.

    Raises:
        ValueError, TypeError: as `causal_conv1d`.

    Cost: D·T² elements. Source: `causal_conv1d`'s. Differentiable.

    >>> import torch, onchip
    >>> onchip.causal_conv1d_matrix(torch.tensor([[2.0, 3.0]]), 3)
    tensor([[[3., 0., 0.],
             [2., 3., 0.],
             [0., 2., 3.]]])
    """
    checks.check_matrix(weight, length)
    return reference.matrix(weight, length)


_select.register(causal_conv1d, IMPLEMENTATIONS, tensors=1)
_select.register(causal_conv1d_step, IMPLEMENTATIONS, tensors=1)
