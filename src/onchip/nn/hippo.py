"""HiPPO: a signal's history as N coefficients in an orthogonal basis, kept up to date by a linear system.

    c'(t) = A c(t) + B f(t)            LegT, LagT, Fourier: time-invariant
    c'(t) = (A c(t) + B f(t)) / t      LegS: the measure spreads with the history

Everything here is float64 on the CPU unless arguments say otherwise: the matrices are made once, and their powers leave
nothing for float32 to lose.

Source: Gu et al., HiPPO (arXiv 2008.07669); Gu et al., S4 (arXiv 2111.00396) for the low-rank form; Gu et al., How to
Train Your HiPPO (arXiv 2206.12037) for Fourier.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LowRank", "Transition", "discretize", "legs_update", "low_rank", "reconstruct", "transition"]

Measure = Literal["legs", "legt", "lagt", "fourier"]
Method = Literal["forward", "backward", "bilinear", "gbt", "zoh"]

_ALPHA = {"forward": 0.0, "bilinear": 0.5, "backward": 1.0}


class Transition(NamedTuple):
    """`A (..., N, N)` and `B (..., N)` of a linear system, in continuous or in discrete time."""

    A: Tensor
    B: Tensor


class LowRank(NamedTuple):
    """A HiPPO system in the basis where it is diagonal but for a term of low rank, one of each conjugate pair kept.

    With a bar for the conjugate, and every sum over both of a pair:

        A = V (diag(Λ) - P P*) V*,    B = V B̂,    c = 2 Re(V z) for the coefficients z of V

    `Lambda (N/2,)`, `P (N/2, rank)`, `B (N/2,)` and `V (N, N/2)`, all complex128.
    """

    Lambda: Tensor
    P: Tensor
    B: Tensor
    V: Tensor


def transition(measure: Measure, N: int) -> Transition:
    r"""The matrices A and B of a HiPPO measure, with b[n] = √(2n + 1):

        legs     A[n, k] = -b[n]·b[k] if n > k, -(n + 1) if n = k, else 0;  B = b
        legt     A[n, k] = -b[n]·b[k] if n ≥ k, -(-1)^(n - k)·b[n]·b[k] else;  B = b
        lagt     A[n, k] = -1 if n > k, -1/2 if n = k, else 0;  B = 1
        fourier  2π times the turns of each (cos, sin) pair, less 2·e·eᵀ with e = (1, 0, √2, 0, √2, …);  B = 2·e

    LegS weighs all of the history alike, LegT and Fourier the last unit of time (a window θ is had by a step dt/θ),
    LagT the past with weight exp(-lag).

    Two traps. Other code halves A and B of LegT and Fourier, which makes the window 2 units long; here it is 1, as in
    the papers. LegS is this A and B divided by the time t, which S4 and LSSL leave out on purpose: without the division
    it is another, time-invariant system, whose basis is warped exponentially.

    Args:
        measure: "legs", "legt", "lagt" or "fourier".
        N: the number of coefficients, at least 1; even for "fourier".

    Returns:
        `A (N, N)` and `B (N,)`, float64.

    Raises:
        ValueError: an unknown measure, or an N that it does not have.

    Source: Gu et al. (arXiv 2008.07669), theorems 1 and 2 and appendix D; Fourier: arXiv 2206.12037, §4. LagT is
    symmetrised: its coefficients are those of exp(-lag/2)·L_n(lag), so that A = ½I - tril(1).

    >>> transition("legs", 2)
    Transition(A=tensor([[-1.0000, -0.0000],
                         [-1.7321, -2.0000]], dtype=torch.float64),
               B=tensor([1.0000, 1.7321], dtype=torch.float64))
    """
    _check_measure(measure, N)
    n = torch.arange(N, dtype=torch.float64, device="cpu")
    b = (2 * n + 1).sqrt()
    if measure == "legs":
        return Transition(-torch.outer(b, b).tril(-1) - torch.diag(n + 1), b)
    if measure == "legt":
        parity = 1 - 2 * ((n[:, None] - n) % 2)
        return Transition(-torch.outer(b, b) * torch.where(n[:, None] >= n, 1.0, parity), b)
    if measure == "lagt":
        one = torch.ones_like(n)
        return Transition(one.diag() / 2 - torch.outer(one, one).tril(), one)
    e = math.sqrt(2) * (1 - n % 2)
    e[0] = 1
    turns = math.pi * (n * (1 - n % 2))[:-1]  # between 2k and 2k + 1: 2πk
    return Transition(torch.diag(turns, -1) - torch.diag(turns, 1) - 2 * torch.outer(e, e), 2 * e)


def discretize(
    A: Tensor, B: Tensor, dt: Tensor | float, method: Method = "bilinear", *, alpha: float | None = None
) -> Transition:
    r"""The discrete system c[t] = Ā c[t-1] + B̄ f[t] of the continuous one, for steps of length dt.

        gbt(α)   Ā = (I - α·dt·A)⁻¹ (I + (1 - α)·dt·A),    B̄ = (I - α·dt·A)⁻¹ dt·B
        zoh      Ā = exp(dt·A),    B̄ = ∫₀^dt exp(s·A) ds·B

    Forward Euler, bilinear (Tustin) and backward Euler are gbt with α = 0, ½ and 1. The zero-order hold is exact for
    an input that is constant between samples. It is read off the exponential of the block matrix [[A, B], [0, 0]]·dt,
    not from A⁻¹(Ā - I)B, and so serves a singular A.

    Args:
        A: `(..., N, N)`, any floating dtype of at least 32 bits.
        B: `(..., N)`.
        dt: a number, or a tensor that broadcasts with the leading dimensions.
        method: "forward", "backward", "bilinear", "gbt" or "zoh".
        alpha: of gbt, from 0 to 1; None for the others.

    Returns:
        `Ā (..., N, N)` and `B̄ (..., N)`, differentiable in A, B and dt.

    Raises:
        ValueError: shapes that do not fit, an unknown method, or an `alpha` out of range or out of place.

    Cost: about 2⅔·N³ operations a system; for zoh some ten times that.

    Source: Gu et al. (arXiv 2008.07669), appendix B.3.

    >>> import torch
    >>> A, B = transition("legt", 4)
    >>> discretize(A, B, 0.1, "bilinear").A.shape
    torch.Size([4, 4])
    >>> steps = torch.tensor([0.1, 0.01], dtype=torch.float64)
    >>> discretize(A, B, steps, "zoh").A.shape
    torch.Size([2, 4, 4])
    """
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or B.shape[-1:] != A.shape[-1:]:
        raise ValueError(f"A must be (..., N, N) and B (..., N), got {tuple(A.shape)} and {tuple(B.shape)}")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if (method == "gbt") != (alpha is not None) or (alpha is not None and not 0 <= alpha <= 1):
        raise ValueError(f'alpha must be from 0 to 1 with method "gbt", and None with any other, got {alpha!r}')
    N = A.shape[-1]
    dt = torch.as_tensor(dt, dtype=A.dtype, device=A.device)
    systems = torch.broadcast_shapes(A.shape[:-2], B.shape[:-1], dt.shape)  # type: ignore[no-untyped-call]
    AB = torch.cat([A.expand(*systems, N, N), B.expand(*systems, N)[..., None]], dim=-1) * dt[..., None, None]
    if method == "zoh":
        moved = torch.linalg.matrix_exp(F.pad(AB, (0, 0, 0, 1)))[..., :N, :]
    else:
        a = _ALPHA[method] if alpha is None else alpha
        identity = torch.eye(N, N + 1, dtype=A.dtype, device=A.device)
        moved = identity + AB * torch.tensor([1 - a] * N + [1], dtype=A.dtype, device=A.device)
        if a:
            moved = torch.linalg.solve(identity[:, :N] - a * AB[..., :N], moved)
    return Transition(moved[..., :N], moved[..., N])


def low_rank(measure: Measure, N: int) -> LowRank:
    r"""A HiPPO system as diagonal plus low rank: A + P Pᵀ is normal, so a unitary V makes it diagonal.

        legs     P = √(n + ½), rank 1          lagt     P = √½, rank 1
        legt     P = √(2n + 1) on the even n, and on the odd: rank 2
        fourier  P = √2·(1, 0, √2, 0, …), rank 1

    A + P Pᵀ is skew-symmetric, but for LegS's diagonal of -½. Its eigenvalues come from a Hermitian solver, and are
    imaginary, respectively -½ + imaginary, to the last bit.

    Args:
        measure: "legs", "legt", "lagt" or "fourier".
        N: the number of coefficients, even.

    Returns:
        `LowRank`, complex128, sorted by frequency.

    Raises:
        ValueError: an unknown measure, or an odd N.

    Source: Gu et al. (arXiv 2111.00396), theorem 1 and appendix C.

    >>> low_rank("legs", 4).Lambda
    tensor([-0.5000+0.5565j, -0.5000+4.6033j], dtype=torch.complex128)
    """
    A, B = transition(measure, N)
    if N % 2:
        raise ValueError(f"N must be even, got {N}")
    n = torch.arange(N, dtype=torch.float64, device="cpu")
    even = 1 - n % 2
    P = B[:, None] * (torch.stack([even, 1 - even], dim=-1) if measure == "legt" else math.sqrt(0.5))
    normal = A + P @ P.mT
    decay = normal.diagonal().mean()
    skew = (normal - normal.mT) / 2
    frequency, V = torch.linalg.eigh(-1j * skew)
    frequency, V = frequency[N // 2 :], V[:, N // 2 :]
    still = frequency.abs() <= 1e-9 * frequency.abs().max()
    if still.any():  # where turns are zero, eigenvectors come in no pairs: make them of the real null space
        null = torch.linalg.svd(skew).Vh[N - 2 * int(still.sum()) :].to(V.dtype)
        V = torch.cat([((null[::2] + 1j * null[1::2]) / math.sqrt(2)).mT, V[:, ~still]], dim=1)
        frequency = torch.cat([frequency.new_zeros(len(null) // 2), frequency[~still]])
    return LowRank(torch.complex(decay.expand_as(frequency), frequency), V.mH @ P.to(V.dtype), V.mH @ B.to(V.dtype), V)


def legs_update(c: Tensor, f: Tensor, t: Tensor | int, method: Method = "bilinear") -> Tensor:
    r"""LegS's coefficients after one more input, in O(N): A is a scaled cumulative sum, and so is its inverse.

        (I - α·A/t) c[t] = (I + (1 - α)·A/t) c[t-1] + B·f[t] / t,    c[1] = (f[1], 0, 0, …)

    the step dt = 1/t of `discretize`, and its result to rounding, without the N² entries of a matrix.

    Args:
        c: `(..., N)`, the coefficients before.
        f: `(...,)`, the input, broadcast with c's leading dimensions.
        t: how many inputs there are with this one, from 1; a number or a tensor that broadcasts with `f`.
        method: "forward", "bilinear" or "backward".

    Returns:
        `(..., N)`, differentiable.

    Raises:
        ValueError: another method, or a number `t` below 1.

    Numerics: the dtype of c. Forward Euler grows without bound while t < N/2; the others never do.

    Cost: some 10·N multiplications and additions; the inverse in 2·log₂(N) passes over vectors that halve.

    Source: Gu et al. (arXiv 2008.07669), proposition 4 and appendix E.2; the first input by the limit t → 0, where the
    history is a constant.

    >>> import torch
    >>> c = torch.zeros(3, dtype=torch.float64)
    >>> for t, f in enumerate([5.0, 5.0, 5.0], start=1):
    ...     c = legs_update(c, torch.tensor(f), t)
    >>> c.abs().round(decimals=6)  # a constant: its mean, and nothing else
    tensor([5., 0., 0.], dtype=torch.float64)
    """
    if method not in _ALPHA:
        raise ValueError(f"method must be one of {', '.join(_ALPHA)}, got {method!r}")
    if isinstance(t, int) and t < 1:
        raise ValueError(f"t must be at least 1, got {t}")
    n = torch.arange(c.shape[-1], dtype=c.dtype, device=c.device)
    b, f = (2 * n + 1).sqrt(), f.to(c.dtype)[..., None]
    t = torch.as_tensor(t, dtype=c.dtype, device=c.device)[..., None]
    alpha, dt = _ALPHA[method], 1 / t
    moved = c + dt * b * f
    if alpha < 1:
        moved = moved - (1 - alpha) * dt * (b * (b * c).cumsum(-1) - n * c)
    if alpha > 0:
        moved = _solve_legs(moved, alpha * dt, n, b)
    return torch.where(t == 1, F.pad(f.expand(*moved.shape[:-1], 1), (0, len(n) - 1)), moved)


def reconstruct(c: Tensor, lag: Tensor, measure: Measure = "legs") -> Tensor:
    r"""The signal that the coefficients stand for, some time ago.

        f(now - lag) ≈ Σ_n c[n]·g_n(lag)

    with g_n(lag) = √(2n + 1)·P_n(1 - 2·lag) for LegS and LegT, exp(-lag/2)·L_n(lag) for LagT, and 1, √2·cos(2πk·lag)
    and √2·sin(2πk·lag) for Fourier.

    Args:
        c: `(..., N)`, coefficients.
        lag: `(M,)`, how long ago, at least 0. In LegS the unit is the length of the whole history, in LegT and Fourier
            that of the window: nothing is known of a lag beyond 1.
        measure: the one that c was made with.

    Returns:
        `(..., M)` in c's dtype.

    Raises:
        ValueError: an unknown measure.

    Source: Gu et al. (arXiv 2008.07669), equation 7 and appendix D.

    >>> import torch
    >>> c = torch.tensor([2.0, 1.0])
    >>> reconstruct(c, torch.tensor([0.0, 0.5, 1.0]))  # a line: 2 in the middle
    tensor([3.7321, 2.0000, 0.2679])
    """
    N = c.shape[-1]
    _check_measure(measure, N)
    lag = lag.to(torch.float64)
    n = torch.arange(N, dtype=torch.float64, device=lag.device)
    if measure == "fourier":
        angle = math.pi * torch.outer(n - n % 2, lag)
        g = math.sqrt(2) * torch.where((n % 2 == 0)[:, None], angle.cos(), angle.sin())
        g[0] = 1
    elif measure == "lagt":
        g = _orthogonal(N, lambda k: ((2 * k + 1 - lag) / (k + 1), k / (k + 1)), lag) * torch.exp(-lag / 2)
    else:
        g = _orthogonal(N, lambda k: ((2 * k + 1) / (k + 1) * (1 - 2 * lag), k / (k + 1)), lag)
        g = g * (2 * n + 1).sqrt()[:, None]
    return c @ g.to(c)


def _solve_legs(r: Tensor, dt: Tensor, n: Tensor, b: Tensor) -> Tensor:
    """x with (I - dt·A) x = r for LegS: forward substitution, whose sums S[n] = Σ_(k<n) b[k]·x[k] are a recurrence."""
    pivot = 1 + dt * (n + 1)
    sums = _recurrence(((1 - dt * n) / pivot).expand_as(r), b * r / pivot)
    return (r - dt * b * F.pad(sums[..., :-1], (1, 0))) / pivot


def _recurrence(a: Tensor, g: Tensor) -> Tensor:
    """s[n] = a[n]·s[n-1] + g[n] along the last dimension: pairs merge into a recurrence of half the length."""
    N = g.shape[-1]
    if N == 1:
        return g
    even = N - N % 2
    a0, a1, g0, g1 = a[..., :even:2], a[..., 1::2], g[..., :even:2], g[..., 1::2]
    second = _recurrence(a0 * a1, a1 * g0 + g1)
    first = a0 * F.pad(second[..., :-1], (1, 0)) + g0
    pairs = torch.stack([first, second], dim=-1).flatten(-2)
    return pairs if even == N else torch.cat([pairs, a[..., -1:] * second[..., -1:] + g[..., -1:]], dim=-1)


def _orthogonal(N: int, step: Callable[[int], tuple[Tensor, float]], at: Tensor) -> Tensor:
    """`(N, M)`: polynomials p[0] = 1, p[k + 1] = u·p[k] - v·p[k - 1], with u and v by `step(k)`."""
    p = [torch.ones_like(at), torch.zeros_like(at)]  # p[-1] in the last place
    for k in range(N - 1):
        u, v = step(k)
        p.insert(-1, u * p[k] - v * p[k - 1])
    return torch.stack(p[:N])


def _check_measure(measure: str, N: int) -> None:
    if measure not in get_args(Measure):
        raise ValueError(f"measure must be one of {', '.join(get_args(Measure))}, got {measure!r}")
    if N < 1 or (measure == "fourier" and N % 2):
        raise ValueError(f"N must be {'even and ' if measure == 'fourier' else ''}at least 1, got {N}")
