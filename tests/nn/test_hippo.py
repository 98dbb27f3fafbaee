import math
import re

import numpy as np
import pytest
import scipy.signal
import scipy.special
import torch

from onchip.nn.hippo import discretize, legs_update, low_rank, reconstruct, transition

MEASURES = ["legs", "legt", "lagt", "fourier"]
METHODS = ["forward", "bilinear", "backward"]


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=atol)


def test_legs_as_published():
    """Equation 2 of the S4 paper, entry by entry."""
    A, B = transition("legs", 5)
    for n in range(5):
        assert B[n] == math.sqrt(2 * n + 1)
        for k in range(5):
            expected = -math.sqrt(2 * n + 1) * math.sqrt(2 * k + 1) if n > k else -(n + 1) if n == k else 0
            assert A[n, k] == pytest.approx(expected, rel=1e-15)


def signal(t):
    return torch.sin(2 * t) + 0.5 * torch.cos(5 * t + 1)


# LegS: steps of 1/t are off by half a sample, times the slope; the others: what N functions leave over of a window.
@pytest.mark.parametrize("measure, N, tolerance", [("legs", 16, 1e-3), ("legt", 8, 5e-3), ("fourier", 64, 0.05)])
def test_a_measure_remembers_what_it_weighs(measure, N, tolerance):
    """Run in small steps, the system holds the projection: the signal comes back. A halved A would be far off."""
    steps = 4000
    dt = 3 / steps
    f = signal((torch.arange(steps, dtype=torch.float64) + 0.5) * dt)
    A, B = transition(measure, N)
    c = torch.zeros(N, dtype=torch.float64)
    if measure != "legs":
        A, B = discretize(A, B, dt, "zoh")
    for t in range(steps):
        c = legs_update(c, f[t], t + 1) if measure == "legs" else A @ c + B * f[t]
    lag = torch.linspace(0.05, 0.95, 50, dtype=torch.float64)
    expected = signal(3 - lag * (3 if measure == "legs" else 1))
    assert (reconstruct(c, lag, measure) - expected).square().mean().sqrt() < tolerance


def test_lagt_remembers_with_decay():
    """Its coefficients are the integrals of the signal with exp(-lag/2)·L_n(lag), which are orthonormal."""
    dt, N = 0.002, 6
    lag = (torch.arange(20_000, dtype=torch.float64) + 0.5) * dt
    f = signal(40 - lag)
    A, B = discretize(*transition("lagt", N), dt, "zoh")
    c = torch.zeros(N, dtype=torch.float64)
    for f_t in f.flip(0):
        c = A @ c + B * f_t
    laguerre = np.stack([scipy.special.eval_laguerre(n, lag.numpy()) for n in range(N)])
    g = torch.from_numpy(laguerre) * torch.exp(-lag / 2)
    close(c, (g * f).sum(-1) * dt, atol=1e-4)
    close(reconstruct(c, lag[:50], "lagt"), c @ g[:, :50], atol=1e-10)


@pytest.mark.parametrize("measure", ["legs", "legt"])
def test_the_basis_is_legendre(measure):
    lag = torch.linspace(0, 1, 11, dtype=torch.float64)
    for n in range(9):
        c = torch.zeros(9, dtype=torch.float64)
        c[n] = 1
        expected = math.sqrt(2 * n + 1) * scipy.special.eval_legendre(n, 1 - 2 * lag.numpy())
        close(reconstruct(c, lag, measure), torch.from_numpy(expected))


def test_legs_with_a_zero_order_hold_is_the_projection():
    """For a piecewise constant signal the continuous system is solved exactly: Legendre integrals, in closed form."""
    N, T = 10, 30
    f = torch.randn(T, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A, B = transition("legs", N)
    c = torch.nn.functional.pad(f[:1], (0, N - 1))
    for t in range(1, T):
        step = discretize(A, B, math.log((t + 1) / t), "zoh")
        c = step.A @ c + step.B * f[t]
    edges = np.linspace(-1, 1, T + 1)
    for n in range(N):
        integral = np.polynomial.legendre.Legendre.basis(n).integ()
        weights = torch.from_numpy(np.diff(integral(edges)) / 2) * math.sqrt(2 * n + 1)
        close(c[n], weights @ f)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("method, alpha", [*[(m, None) for m in METHODS], ("gbt", 0.3), ("zoh", None)])
def test_discretize_is_scipys(measure, method, alpha):
    N, dt = 6, 0.05
    A, B = transition(measure, N)
    names = {"forward": "euler", "backward": "backward_diff"}
    continuous = (A.numpy(), B[:, None].numpy(), np.eye(N), np.zeros((N, 1)))
    expected_A, expected_B, *_ = scipy.signal.cont2discrete(continuous, dt, names.get(method, method), alpha)
    found = discretize(A, B, dt, method, alpha=alpha)
    close(found.A, torch.from_numpy(expected_A))
    close(found.B, torch.from_numpy(expected_B[:, 0]))


def test_a_zero_order_hold_survives_a_singular_matrix():
    A, B = torch.zeros(2, 2, dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    A[0, 1] = 1
    found = discretize(A, B, 0.5, "zoh")
    close(found.A, torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64))
    close(found.B, torch.tensor([0.5 + 2 * 0.125, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("method, alpha", [("forward", None), ("gbt", 0.7), ("zoh", None)])
def test_discretize_has_gradients_and_batches(method, alpha):
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((2, 1, 3, 3), (4, 3)))
    dt = torch.rand(4, dtype=torch.float64, generator=generator)
    leaves = [x.requires_grad_() for x in (A, B, dt)]
    assert torch.autograd.gradcheck(lambda A, B, dt: discretize(A, B, dt, method, alpha=alpha), leaves)
    found = discretize(A, B, dt, method, alpha=alpha)
    assert found.A.shape == (2, 4, 3, 3) and found.B.shape == (2, 4, 3)
    one = discretize(A[1, 0], B[2], dt[2], method, alpha=alpha)
    close(found.A[1, 2], one.A)
    close(found.B[1, 2], one.B)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("N", [2, 4, 16, 64])
def test_low_rank_is_the_dense_matrix(measure, N):
    A, B = transition(measure, N)
    form = low_rank(measure, N)
    assert form.P.shape == (N // 2, 2 if measure == "legt" else 1)
    V = torch.cat([form.V, form.V.conj()], dim=1)
    close(V.mH @ V, torch.eye(N, dtype=V.dtype))
    P, both = V.mH @ V @ torch.cat([form.P, form.P.conj()]), torch.cat([form.Lambda, form.Lambda.conj()])
    scale = A.abs().max().item()
    close(V @ (both.diag() - P @ P.mH) @ V.mH, A.to(V.dtype), atol=1e-12 * scale)
    close(2 * (form.V @ form.B).real, B, atol=1e-12 * scale)
    assert (form.Lambda.imag >= 0).all() and (form.Lambda.imag.diff() > 0).all()
    close(form.Lambda.real, torch.full((N // 2,), -0.5 if measure == "legs" else 0.0, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("N", [1, 2, 7, 64])
def test_linear_time_legs_is_dense(method, N):
    A, B = transition("legs", N)
    generator = torch.Generator().manual_seed(0)
    c, f = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((3, N), (3,)))
    for t in (2, 3, 7, N + 1, 1000):  # a pivot of the recurrence is zero at t = n
        dense = discretize(A, B, 1 / t, method)
        expected = c @ dense.A.mT + f[:, None] * dense.B
        scale = expected.abs().max().item()
        close(legs_update(c, f, t, method), expected, atol=1e-12 * max(scale, 1))
    close(legs_update(c, f, 1, method), torch.nn.functional.pad(f[:, None], (0, N - 1)))


def test_linear_time_legs_has_gradients_and_takes_each_rows_time():
    generator = torch.Generator().manual_seed(0)
    c, f = (torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in ((3, 5), (3,)))
    t = torch.tensor([1, 2, 40])
    assert torch.autograd.gradcheck(lambda c, f: legs_update(c, f, t), (c, f))
    close(legs_update(c, f, t), torch.stack([legs_update(c[i], f[i], int(t[i])) for i in range(3)]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: transition("legz", 4), "measure must be one of legs, legt, lagt, fourier, got 'legz'"),
        (lambda: transition("fourier", 5), "N must be even and at least 1, got 5"),
        (lambda: transition("legs", 0), "at least 1, got 0"),
        (lambda: low_rank("legs", 3), "N must be even, got 3"),
        (lambda: discretize(torch.eye(3), torch.ones(2), 0.1), "A must be (..., N, N) and B (..., N), got (3, 3)"),
        (lambda: discretize(torch.eye(3), torch.ones(3), 0.1, "tustin"), "method must be one of forward"),
        (lambda: discretize(torch.eye(3), torch.ones(3), 0.1, "gbt"), "alpha must be from 0 to 1"),
        (lambda: discretize(torch.eye(3), torch.ones(3), 0.1, "zoh", alpha=0.5), "None with any other, got 0.5"),
        (lambda: legs_update(torch.ones(3), torch.ones(()), 2, "zoh"), "one of forward, bilinear, backward, got 'zoh'"),
        (lambda: legs_update(torch.ones(3), torch.ones(()), 0), "t must be at least 1, got 0"),
        (lambda: reconstruct(torch.ones(3), torch.ones(2), "fourier"), "N must be even"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
