"""mamba_ssm.ops.triton.ssd_combined: Mamba-2's scan in chunks, and its fused block."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from onchip.integrations._packing import Packing, packing
from onchip.integrations.mamba_ssm._arguments import check_are_tensors
from onchip.integrations.mamba_ssm.layernorm_gated import rmsnorm_fn
from onchip.ops import causal_conv1d, ssd
from onchip.ops._count import check_sizes
from onchip.ops._sequence import check_tensor
from onchip.ops.attention.checks import DTYPES
from onchip.ops.causal_conv1d.checks import Activation
from onchip.ops.ssd.checks import check_sequence

__all__ = ["mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"]


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Mamba-2's scan; see `onchip.ssd`.

    Args:
        x: `(batch, length, heads, head_dim)`.
        dt: `(batch, length, heads)`.
        A: `(heads,)`.
        B: `(batch, length, groups, d_state)`.
        C: as B.
        chunk_size: how many tokens one matrix product spans; it changes no more than rounding.
        D: `(heads,)` or `(heads, head_dim)`.
        z: as x: the gate.
        dt_bias: `(heads,)`.
        initial_states: `(batch, heads, head_dim, d_state)`: those of each row's first sequence.
        seq_idx: `(batch, length)` integers: where the number changes a new sequence begins, with a state of zeros.
        cu_seqlens: `(sequences + 1,)`: where the sequences of a batch of one begin, as `seq_idx` has them.
        dt_softplus: take the softplus of dt + dt_bias.
        dt_limit: clamp the steps to this range.
        return_final_states: return `(batch, heads, head_dim, d_state)` after the last token of each row, too.
        return_varlen_states: return `(sequences, heads, head_dim, d_state)` after each sequence of `cu_seqlens`, too.
        state_dtype: what returned states are rounded to, float64, float32, bfloat16 or float16; by default float32, in
            which they are carried whatever this is.

    Returns:
        `(batch, length, heads, head_dim)` in x's dtype, then the states that are asked for, in this order; gradients
        flow through all of them.

    Raises:
        ValueError: `return_varlen_states` without `cu_seqlens` or with a batch other than one; `cu_seqlens` that
            disagree with `seq_idx`; and what `onchip.ssd` raises.
        TypeError: a `state_dtype` that is none of the four; and what `onchip.ssd` raises.

    >>> import torch
    >>> x, dt, A = torch.randn(2, 40, 4, 8), torch.rand(2, 40, 4), -torch.rand(4)
    >>> B, C = torch.randn(2, 2, 40, 1, 16).unbind(0)
    >>> out, states = mamba_chunk_scan_combined(x, dt, A, B, C, 16, return_final_states=True)
    >>> out.shape, states.shape
    (torch.Size([2, 40, 4, 8]), torch.Size([2, 4, 8, 16]))
    """
    check_tensor("x", x, ("batch", "length", "heads", "head_dim"), x, any_float=False)
    if state_dtype not in (None, *DTYPES):
        raise TypeError(f"state_dtype must be None, float64, float32, bfloat16 or float16, got {state_dtype!r}")
    shape = x.shape
    together = None if seq_idx is None else packing(seq_idx, *x.shape[:2])
    if cu_seqlens is not None or return_varlen_states:
        _check_boundaries(cu_seqlens, together, x)
    B, C = (u.to(x.dtype) if isinstance(u, Tensor) else u for u in (B, C))
    if together is not None:
        # Now, as rows and tokens become one dimension: 2 rows of 40 and 4 of 20 would be the same then.
        check_sequence(x, dt, A, B, C, D, z, initial_states, None)
        initial_states = together.initial_states(initial_states)
        x, dt, B, C = (u.flatten(0, 1) for u in (x, dt, B, C))
        z = None if z is None else z.flatten(0, 1)
    out, states = ssd(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=_limit(dt_limit, dt_softplus),
        chunk_size=chunk_size,
        initial_state=initial_states,
        return_final_state=True,
        cu_seqlens=None if together is None else together.cu_seqlens,
    )
    states = states if state_dtype is None else states.to(state_dtype)
    results = [out.view(shape)]
    if return_final_states:
        results.append(states if together is None else states[together.last])
    if return_varlen_states:
        results.append(states)
    return tuple(results) if len(results) > 1 else results[0]


def _limit(dt_limit: tuple[float, float], dt_softplus: bool) -> tuple[float, float] | None:
    """None where it limits nothing: a softplus is positive."""
    if dt_limit is None:  # which to `ssd` is another range than the default here
        raise ValueError("dt_limit must be a pair (low, high) of numbers, got None")
    return None if dt_softplus and dt_limit in ((0.0, math.inf), [0.0, math.inf]) else dt_limit


def _check_boundaries(cu_seqlens: Tensor | None, together: Packing | None, x: Tensor) -> None:
    """`cu_seqlens` is there, and says of a single row what `seq_idx` says, which is what resets the state."""
    if cu_seqlens is None:
        raise ValueError("cu_seqlens must be given where return_varlen_states is")
    if together is None:
        raise ValueError("seq_idx must be given where cu_seqlens is: without it the sequences would share their state")
    if x.shape[0] != 1:
        raise ValueError(f"x must have a batch of 1 where cu_seqlens is given, got {x.shape[0]}")
    if cu_seqlens.tolist() != together.cu_seqlens.tolist():
        raise ValueError(
            f"cu_seqlens must be where seq_idx changes, {together.cu_seqlens.tolist()}, got {cu_seqlens.tolist()}"
        )


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: Activation = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """A Mamba-2 block after its first projection: convolution, scan (with a softplus of dt), gate or norm, projection.

    Args:
        zxbcdt: `(batch, length, 2·d_mlp + 2·dim + 2·groups·d_state + heads)`: first the two halves of a gated MLP, if
            it is wider than the rest needs, then the gate, x, B, C and dt.
        conv1d_weight: `(dim + 2·groups·d_state, width)`.
        conv1d_bias: its length.
        dt_bias: `(heads,)`.
        A: `(heads,)`.
        D: `(heads, head_dim)`, or `(heads,)` with `headdim`.
        chunk_size, initial_states, seq_idx, dt_limit, return_final_states: as of `mamba_chunk_scan_combined`. `seq_idx`
            also keeps the convolution within each sequence.
        activation: of the convolution: "silu", "swish" or None.
        rmsnorm_weight: `(dim,)`: the gate goes into a norm over each group's features. Without it into the scan.
        rmsnorm_eps: what that norm adds to the mean of squares.
        outproj_weight: `(d_out, d_mlp + dim)`.
        outproj_bias: `(d_out,)`.
        headdim: features of a head.
        ngroups: how many heads' groups B and C have.
        norm_before_gate: norm first, then the gate.
        state_dtype: as of `mamba_chunk_scan_combined`.

    Returns:
        `(batch, length, d_mlp + dim)`, or `(…, d_out)`; with `return_final_states` also the states.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; `outproj_bias` without `outproj_weight`.

    >>> import torch
    >>> zxbcdt, conv, dt_bias = torch.randn(2, 40, 2 * 32 + 2 * 16 + 4), torch.randn(32 + 2 * 16, 4), torch.zeros(4)
    >>> mamba_split_conv1d_scan_combined(zxbcdt, conv, None, dt_bias, -torch.rand(4), torch.ones(4, 8), 16).shape
    torch.Size([2, 40, 32])
    """
    check_are_tensors(zxbcdt=zxbcdt, conv1d_weight=conv1d_weight, D=D)
    check_sizes(ngroups=ngroups)
    if outproj_weight is not None:
        check_are_tensors(outproj_weight=outproj_weight)
    heads, P = len(D), D.shape[1] if D.ndim == 2 else headdim
    if P is None:
        raise ValueError("headdim must be given where D has shape (heads,)")
    check_sizes(headdim=P)
    if headdim not in (None, P):
        raise ValueError(f"headdim must be that of D {tuple(D.shape)}, got {headdim}")
    if outproj_bias is not None and outproj_weight is None:
        raise ValueError("outproj_bias must be None where outproj_weight is")
    dim = heads * P
    N = (len(conv1d_weight) - dim) // (2 * ngroups)
    d_mlp = (zxbcdt.shape[-1] - dim - len(conv1d_weight) - heads) // 2
    sizes = [2 * d_mlp, dim, len(conv1d_weight), heads]
    if sum(sizes) != zxbcdt.shape[-1] or d_mlp < 0 or dim + 2 * ngroups * N != len(conv1d_weight):
        raise ValueError(
            f"zxbcdt, conv1d_weight and D must agree on the sizes of z, x, B, C and dt, got {tuple(zxbcdt.shape)}, "
            f"{tuple(conv1d_weight.shape)} and {tuple(D.shape)} with headdim {headdim} and ngroups {ngroups}"
        )
    mlp, z, xBC, dt = torch.split(zxbcdt, sizes, dim=-1)
    tokens = zxbcdt.shape[:2]
    xBC = _convolved(xBC, conv1d_weight, conv1d_bias, activation, seq_idx)
    x, B, C = torch.split(xBC, [dim, ngroups * N, ngroups * N], dim=-1)
    y, *states = mamba_chunk_scan_combined(
        x.reshape(*tokens, heads, P),
        dt,
        A,
        B.reshape(*tokens, ngroups, N),
        C.reshape(*tokens, ngroups, N),
        chunk_size,
        D=D,
        z=z.reshape(*tokens, heads, P) if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
        state_dtype=state_dtype,
    )
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, dim // ngroups, norm_before_gate)
    if d_mlp > 0:
        gate, up = mlp.chunk(2, dim=-1)
        y = torch.cat([F.silu(gate) * up, y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y.to(outproj_weight.dtype), outproj_weight, outproj_bias)
    return (y, *states) if return_final_states else y


def _convolved(
    xBC: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, seq_idx: Tensor | None
) -> Tensor:
    if seq_idx is None:
        return causal_conv1d(xBC, weight, bias, activation=activation)
    cu_seqlens = packing(seq_idx, *xBC.shape[:2]).cu_seqlens
    return causal_conv1d(xBC.flatten(0, 1), weight, bias, activation=activation, cu_seqlens=cu_seqlens).view(xBC.shape)
