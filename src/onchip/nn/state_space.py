"""Linear time-invariant systems, many at once: as convolutions, as recurrences, and from any state on.

    x[t] = A x[t-1] + B u[t],    y[t] = Re(C x[t])    =    (k * u)[t],    k[l] = Re(C Aˡ B)

A, B and C are in discrete time. A state is real, or complex where it stands for pairs of conjugates of which one is
kept; C then has a factor of 2. H systems have their states next to one another, `(B, H, N)`.
"""

import math
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["LinearSystem", "LowRankSystem", "System", "cauchy_kernel", "causal_convolution"]

_NODES = 1024  # roots of unity at a time, so that memory is not in H·N·L


class System(Protocol):
    """H systems of one input and one output each."""

    def kernel(self, L: int) -> Tensor:
        """The first L terms of the kernels, `(H, L)` real."""

    def advance(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a state `x (B, H, N)` adds to the outputs `(B, H, L)`, and the state after the inputs `u (B, H, L)`."""

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One input `u (B, H)` further: the output `(B, H)` and the state after it."""


class LinearSystem(NamedTuple):
    r"""Systems whose A is dense `(H, N, N)`, or diagonal `(H, N)`; `B` and `C (H, N)`. Real or complex.

    Powers of A come by doubling, [v, Av, …] followed by A^m [v, Av, …], and a kernel as the product of √L rows and √L
    columns, so that nothing has H·N·L numbers:

        k[j·c + i] = (C (A^c)^j) (A^i B)

    With a dense A these are Krylov matrices (LSSL's kernel), with a diagonal one Vandermonde matrices (S4D's).

    Cost of a kernel: 2·H·N·L operations (8 if complex), for a dense A also 2·H·N³·log₂ L for its powers; memory
    H·L + 2·H·N·√L numbers.

    Source: Gu et al., LSSL (arXiv 2110.13985), appendix C.2; Gu et al., S4D (arXiv 2206.11893), §3.2. The factors of
    length √L are ours.

    >>> import torch
    >>> system = LinearSystem(A=torch.tensor([[0.5]]), B=torch.tensor([[1.0]]), C=torch.tensor([[8.0]]))
    >>> system.kernel(4)
    tensor([[8., 4., 2., 1.]])
    >>> system.step(torch.tensor([[1.0]]), torch.tensor([[2.0]]))
    (tensor([[16.]]), tensor([[[2.]]]))
    """

    A: Tensor
    B: Tensor
    C: Tensor

    def kernel(self, L: int) -> Tensor:
        """The first L terms of the kernels, `(H, L)` real."""
        if L == 0:
            return _real(self.B[:, :0])
        c, blocks = _factors(L)
        rows = _krylov(_transposed(_power(self.A, c)), self.C, blocks)
        return _real(rows.mT @ _krylov(self.A, self.B, c)).flatten(-2)[:, :L]

    def advance(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a state `x (B, H, N)` adds to the outputs `(B, H, L)`, and the state after the inputs `u (B, H, L)`."""
        L = u.shape[-1]
        if L == 0:
            return u, x
        c, blocks = _factors(L)
        over_block = _power(self.A, c)
        starts = _krylov(over_block, _times(self.A, x[..., None])[..., 0], blocks)
        y = _real(starts.mT @ _krylov(_transposed(self.A), self.C, c)).flatten(-2)[..., :L]
        padded = F.pad(u, (blocks * c - L, 0)).reshape(*u.shape[:-1], blocks, c).to(self.A.dtype)
        gathered = _krylov(self.A, self.B, c).flip(-1) @ padded.mT  # (B, H, N, blocks): each block's own final state
        while gathered.shape[-1] > 1:
            gathered = F.pad(gathered, (gathered.shape[-1] % 2, 0))
            gathered = _times(over_block, gathered[..., ::2]) + gathered[..., 1::2]
            over_block = _product(over_block, over_block)
        return y, (_times(_power(self.A, L), x[..., None]) + gathered)[..., 0]

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One input `u (B, H)` further: the output `(B, H)` and the state after it."""
        x = _times(self.A, x[..., None])[..., 0] + self.B * u[..., None]
        return _real((self.C * x).sum(-1)), x


class LowRankSystem(NamedTuple):
    r"""S4's systems: x' = (Λ - P P*) x + B u and y = 2 Re(C x), by the bilinear rule with steps `dt`.

    `Lambda`, `B`, `C (H, N/2)` and `P (H, rank, N/2)` are complex, one of each conjugate pair; `dt (H,)` is real. With
    D = (2/dt - Λ)⁻¹, the discrete A is diagonal plus low rank too, by Woodbury's identity:

        A = D·(2/dt + Λ) - F W,    F = 2·D·P·(I + P* D P)⁻¹,    W = P* D·(2/dt),    B̄ = 2·(I - ½F P*)·D·B

    so that a step takes O(N). The kernel is `cauchy_kernel`'s, with C - C·A^L by dense powers of A.

    Source: Gu et al., S4 (arXiv 2111.00396), appendix C. The paper learns C - C·A^L for one length; here C is learned,
    and kernels of any length are those of the same system.

    >>> import torch
    >>> from onchip.nn import hippo
    >>> form = hippo.low_rank("legs", 8)
    >>> P, dt = form.P.mT[None], torch.tensor([0.01], dtype=torch.float64)
    >>> system = LowRankSystem.bilinear(form.Lambda[None], P, form.B[None], form.B[None].conj(), dt)
    >>> torch.allclose(system.kernel(50), system.dense().kernel(50), atol=1e-12)
    True
    """

    Lambda: Tensor
    P: Tensor
    B: Tensor
    C: Tensor
    dt: Tensor
    diagonal: Tensor
    F: Tensor
    W: Tensor
    B_bar: Tensor

    @classmethod
    def bilinear(cls, Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor) -> Self:
        """The systems in discrete time."""
        rate = 2 / dt[:, None]
        D = 1 / (rate - Lambda)
        DP = D[:, None] * P
        capacitance = torch.eye(P.shape[1], dtype=dt.dtype, device=dt.device) + _pairs(P.conj(), DP)
        DP = torch.linalg.solve(capacitance.mT.to(DP.dtype), DP)  # of D·P·(I + P* D P)⁻¹, the rank in rows
        DB = D * B
        B_bar = 2 * (DB - (DP * _pairs(P.conj(), DB[:, None])).sum(1))
        return cls(Lambda, P, B, C, dt, D * (rate + Lambda), 2 * DP, P.conj() * D[:, None] * rate[:, None], B_bar)

    def dense(self) -> LinearSystem:
        """The same systems with a dense, real A over the real and imaginary parts in turn."""
        units = torch.eye(2 * self.B.shape[-1], dtype=self.dt.dtype, device=self.dt.device)
        A = _parts(self._move(_complex(units)[:, None])).permute(1, 2, 0)
        return LinearSystem(A, _parts(self.B_bar), _parts(2 * self.C.conj()))

    def kernel(self, L: int) -> Tensor:
        """The first L terms of the kernels, `(H, L)` real."""
        if L == 0:
            return self.dt.new_zeros(len(self.dt), 0)
        A, _, C = self.dense()
        rest = (C[:, None] @ _power(A, L))[:, 0]
        return cauchy_kernel(self.Lambda, self.P, self.B, _complex(C - rest).conj() / 2, self.dt, L)

    def advance(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a state `x (B, H, N/2)` adds to the outputs `(B, H, L)`, and the state after inputs `u (B, H, L)`."""
        y, x = self.dense().advance(u, _parts(x))
        return y, _complex(x)

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One input `u (B, H)` further: the output `(B, H)` and the state after it."""
        x = self._move(x) + self.B_bar * u[..., None]
        return 2 * (self.C * x).sum(-1).real, x

    def _move(self, x: Tensor) -> Tensor:
        """A x, for `x (..., H, N/2)`."""
        inner = 2 * (self.W * x[..., None, :]).sum(-1, keepdim=True).real
        return self.diagonal * x - (self.F * inner).sum(-2)


def cauchy_kernel(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, L: int) -> Tensor:
    r"""The kernel of S4's system x' = (Λ - P P*) x + B u under the bilinear rule, from its Fourier transform.

    With A, B̄ the discrete system, ω = exp(-√-1·θ), θ = 2πl/L, and C the published C̃, which is C - C·A^L:

        k̂(ω) = C (I - ωA)⁻¹ B̄ = 2/(1 + ω) · C (z - Λ + P P*)⁻¹ B,    z = 2/dt · (1 - ω)/(1 + ω)

    The inverse is a sum Σ_n v[n]·w[n] / (z - Λ[n]) for the diagonal, and one identity of Sherman and Morrison for each
    column of P. As published, z is infinite at ω = -1; here numerator and denominator are multiplied by cos(θ/2):

        (1 - ω)/(1 + ω) = √-1·tan(θ/2),    2/(1 + ω) = exp(√-1·θ/2) / cos(θ/2)

    which leaves sines and cosines, and dt·Re Σ C B at ω = -1, over one of each pair.

    Args:
        Lambda: `(H, N/2)` complex, one of each conjugate pair; real parts negative: none may be 0, as Fourier's is.
        P: `(H, rank, N/2)` complex.
        B, C: `(H, N/2)` complex.
        dt: `(H,)` real, positive.
        L: the length, at least 1.

    Returns:
        `(H, L)` real, differentiable in all tensors.

    Raises:
        ValueError: shapes that do not fit, or L below 1.

    Numerics: the dtype of the arguments. Nothing cancels but z - Λ itself, near a frequency of Λ.

    Cost: 4·H·N·L·(rank + 1)² operations and a transform of length L; memory 16·H·N bytes for each of
    1024 roots of unity, backward too, where each thousand is computed again.

    Source: Gu et al., S4 (arXiv 2111.00396), algorithm 1 and appendix C.3.

    >>> import torch
    >>> one = torch.ones(1, 1, dtype=torch.complex128)
    >>> k = cauchy_kernel(-0.5 * one, 0 * one[None], one, one, torch.tensor([0.1], dtype=torch.float64), L=4)
    >>> k.shape, k.dtype
    (torch.Size([1, 4]), torch.float64)
    """
    H, n = Lambda.shape
    if L < 1:
        raise ValueError(f"L must be at least 1, got {L}")
    for name, x, shape in (("P", P, (H, *P.shape[1:-1], n)), ("B", B, (H, n)), ("C", C, (H, n)), ("dt", dt, (H,))):
        if x.shape != shape or (name == "P" and x.ndim != 3):
            raise ValueError(f"{name} must fit Lambda {tuple(Lambda.shape)}, got {tuple(x.shape)}")
    half = torch.arange(L // 2 + 1, dtype=torch.float64, device=dt.device) * (math.pi / L)
    pieces = []
    for angles in torch.split(half, _NODES):
        if torch.is_grad_enabled() and len(half) > _NODES:
            pieces.append(checkpoint(_transform, angles, Lambda, P, B, C, dt, use_reentrant=False))
        else:
            pieces.append(_transform(angles, Lambda, P, B, C, dt))
    k: Tensor = torch.fft.irfft(torch.cat(pieces, dim=-1), n=L)
    return k


def _transform(half: Tensor, Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor) -> Tensor:
    """k̂ at θ = 2·half, `(H, len(half))`."""
    sin, cos = half.sin().to(dt), half.cos().to(dt)
    decay, frequency = (
        torch.cat([z, sign * z], dim=-1)[..., None] for z, sign in ((-Lambda.real, 1), (Lambda.imag, -1))
    )
    gap, damping = (2 / dt)[:, None, None] * sin - cos * frequency, cos * decay
    scale = 1 / (gap.square() + damping.square())
    resolvent = torch.cat([damping * scale, -gap * scale], dim=1)  # 1 / (damping + √-1·gap), in real arithmetic
    left, right = torch.cat([C[:, None], P.conj()], dim=1), torch.cat([B[:, None], P], dim=1)
    products = left[:, :, None] * right[:, None]  # (H, 1 + rank, 1 + rank, N/2)
    re, im = (torch.cat([z, sign * z], dim=-1).flatten(1, 2) for z, sign in ((products.real, 1), (products.imag, -1)))
    weights = torch.cat([torch.cat([re, -im], dim=-1), torch.cat([im, re], dim=-1)], dim=1)
    R = torch.complex(*(weights @ resolvent).chunk(2, dim=1)).reshape(*products.shape[:3], -1)
    for k in range(P.shape[1], 0, -1):
        R = R - cos * R[:, :, k : k + 1] * R[:, k : k + 1] / (1 + cos * R[:, k : k + 1, k : k + 1])
    return R[:, 0, 0] * torch.polar(torch.ones_like(half), half).to(R)


def causal_convolution(u: Tensor, k: Tensor) -> Tensor:
    r"""y[t] = Σ_(l ≤ t) k[l]·u[t - l], by Fourier transforms of length 2L.

    `u (..., H, L)` and `k (H, at least L)`, float32 or float64; y is of u's shape.

    Cost: 3 transforms of length 2L a channel, 15·H·L·log₂(2L) operations.

    >>> import torch
    >>> causal_convolution(torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[1.0, 0.5, 0.25]]))
    tensor([[1.0000, 1.5000, 1.7500]])
    """
    if not u.numel():
        return u
    L = u.shape[-1]
    y: Tensor = torch.fft.irfft(torch.fft.rfft(u, 2 * L) * torch.fft.rfft(k[..., :L], 2 * L), 2 * L)
    return y[..., :L]


def _factors(L: int) -> tuple[int, int]:
    """The length of a block and how many, near √L both."""
    c = math.isqrt(L - 1) + 1
    return c, -(-L // c)


def _krylov(A: Tensor, v: Tensor, n: int) -> Tensor:
    """`(..., H, N, n)`: v, Av, A²v, … in columns, by doubling."""
    columns = v[..., None]
    while (have := columns.shape[-1]) < n:
        columns = torch.cat([columns, _times(A, columns[..., : n - have])], dim=-1)
        if 2 * have < n:
            A = _product(A, A)
    return columns


def _power(A: Tensor, n: int) -> Tensor:
    """A to the n, at least 1."""
    if n == 1:
        return A
    half = _power(A, n // 2)
    square = _product(half, half)
    return _product(square, A) if n % 2 else square


def _times(A: Tensor, columns: Tensor) -> Tensor:
    """A applied to `columns (..., H, N, m)`."""
    return torch.einsum("hij,...hjm->...him", A, columns) if A.ndim == 3 else A[..., None] * columns


def _product(A: Tensor, E: Tensor) -> Tensor:
    return A @ E if A.ndim == 3 else A * E


def _transposed(A: Tensor) -> Tensor:
    return A.mT if A.ndim == 3 else A


def _real(z: Tensor) -> Tensor:
    return z.real if z.is_complex() else z


def _pairs(v: Tensor, w: Tensor) -> Tensor:
    """The products of the rows of v and w, both of each conjugate pair summed."""
    return 2 * (v @ w.mT).real


def _parts(z: Tensor) -> Tensor:
    """Real and imaginary parts in turn, along the last dimension."""
    return torch.view_as_real(z).flatten(-2)


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2).contiguous())
