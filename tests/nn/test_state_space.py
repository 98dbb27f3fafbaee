import pytest
import torch

from onchip.nn import hippo, state_space
from onchip.nn.state_space import LinearSystem, LowRankSystem, cauchy_kernel, causal_convolution

LENGTHS = [1, 2, 3, 7, 64, 101]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=generator(seed))


def dense_system(H=3, N=6):
    A, B = hippo.discretize(*hippo.transition("legs", N), torch.tensor([0.2, 0.03, 0.01], dtype=torch.float64)[:H])
    return LinearSystem(A, B, normal(H, N))


def diagonal_system(complex_, H=3, N=4):
    if not complex_:
        return LinearSystem(*(normal(H, N, seed=i).clamp(-0.98, 0.98) for i in range(3)))
    A = torch.exp(torch.complex(-0.1 * normal(H, N).abs(), normal(H, N, seed=1)))
    return LinearSystem(A, *(normal(H, N, dtype=torch.complex128, seed=i) for i in (2, 3)))


def low_rank_system(measure="legs", N=8, dtype=torch.float64):
    form = hippo.low_rank(measure, N)
    dt = torch.tensor([0.2, 0.03, 0.001], dtype=torch.float64)
    Lambda = form.Lambda - (1e-3 if measure != "legs" else 0)
    C = normal(3, N // 2, dtype=torch.complex128)
    values = (Lambda.expand(3, -1), form.P.mT.expand(3, -1, -1), form.B.expand(3, -1), C)
    wide = {torch.float64: torch.complex128, torch.float32: torch.complex64}[dtype]
    return LowRankSystem.bilinear(*(z.to(wide) for z in values), dt.to(dtype))


SYSTEMS = {
    "dense": dense_system,
    "complex diagonal": lambda: diagonal_system(True),
    "real diagonal": lambda: diagonal_system(False),
    "low rank 1": low_rank_system,
    "low rank 2": lambda: low_rank_system("legt"),
    "Fourier": lambda: low_rank_system("fourier"),
}


def matrices(system):
    """A, B, C of each channel, dense, by the definition of the system."""
    if isinstance(system, LowRankSystem):
        Lambda, P, B, C, dt = system[:5]
        both = lambda z: torch.cat([z, z.conj()], dim=-1)  # noqa: E731
        A = torch.diag_embed(both(Lambda)) - both(P).mT @ both(P).conj()
        A, B = hippo.discretize(A, both(B), dt, "bilinear")
        return A, B, both(C)
    A = system.A if system.A.ndim == 3 else torch.diag_embed(system.A)
    return A, system.B, system.C


def naive_kernel(system, L):
    A, B, C = matrices(system)
    k, x = [], B
    for _ in range(L):
        k.append((C * x).sum(-1).real if x.is_complex() else (C * x).sum(-1))
        x = (A @ x[..., None])[..., 0]
    return torch.stack(k, dim=-1)


def close(actual, expected):
    scale = max(expected.abs().max().item(), 1) if expected.numel() else 1
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11 * scale)


@pytest.mark.parametrize("make", SYSTEMS.values(), ids=SYSTEMS)
@pytest.mark.parametrize("L", LENGTHS)
def test_kernels_are_the_naive_recurrences(make, L):
    system = make()
    close(system.kernel(L), naive_kernel(system, L))
    assert system.kernel(0).shape == (3, 0)


@pytest.mark.parametrize("make", SYSTEMS.values(), ids=SYSTEMS)
def test_kernel_steps_and_states_agree(make):
    system = make()
    u = normal(2, 3, 50)
    x = torch.zeros(2, *system.B.shape, dtype=system.B.dtype)
    outputs, states = [], [x]
    for u_t in u.unbind(-1):
        y_t, x = system.step(u_t, x)
        outputs.append(y_t)
        states.append(x)
    y = torch.stack(outputs, dim=-1)
    close(causal_convolution(u, system.kernel(50)), y)
    for split in (0, 1, 13, 49, 50):
        rest = u[..., split:]
        added, last = system.advance(rest, states[split])
        close(causal_convolution(rest, system.kernel(50 - split)) + added, y[..., split:])
        torch.testing.assert_close(last, states[-1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt", "fourier"])
def test_s4s_kernel_is_that_of_the_hippo_matrix(measure):
    """The low-rank form in its complex basis against the measure's own real matrices, both a little damped."""
    N, L, dt = 16, 64, torch.tensor([0.1, 0.01], dtype=torch.float64)
    form = hippo.low_rank(measure, N)
    A, B = hippo.transition(measure, N)
    A, B = hippo.discretize(A - 1e-3 * torch.eye(N, dtype=A.dtype), B, dt)
    C = normal(2, N)
    rest = (C[:, None] @ torch.linalg.matrix_power(A, L))[:, 0]
    inputs = (form.Lambda.expand(2, -1) - 1e-3, form.P.mT.expand(2, -1, -1), form.B.expand(2, -1))
    k = cauchy_kernel(*inputs, (C - rest).to(form.V.dtype) @ form.V, dt, L)
    close(k, LinearSystem(A, B, C).kernel(L))


def test_the_root_at_minus_one_is_finite_and_as_given():
    """There the transform is the alternating sum of the kernel: dt·Re Σ C B over one of each pair."""
    _, P, B, C, dt, *_ = system = low_rank_system()
    k = cauchy_kernel(system.Lambda, P, B, C, dt, 32)
    close((k * torch.tensor([1.0, -1.0], dtype=k.dtype).repeat(16)).sum(-1), dt * (C * B).sum(-1).real)


def test_kernels_in_blocks_of_nodes_have_the_same_gradients(monkeypatch):
    system = low_rank_system("legt")
    leaves = [z.clone().requires_grad_() for z in (system.Lambda, system.P, system.B, system.C, system.dt)]
    expected = cauchy_kernel(*leaves, 64)
    weights = normal(3, 64)
    gradients = torch.autograd.grad((expected * weights).sum(), leaves)
    monkeypatch.setattr(state_space, "_NODES", 10)
    k = cauchy_kernel(*leaves, 64)
    close(k, expected)
    for actual, wanted in zip(torch.autograd.grad((k * weights).sum(), leaves), gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", SYSTEMS.values(), ids=SYSTEMS)
def test_gradients(make):
    system = make()
    low_rank = isinstance(system, LowRankSystem)
    leaves = [z[:2].detach().clone().requires_grad_() for z in (system[:5] if low_rank else system)]
    u, x = normal(1, 2, 5).requires_grad_(), normal(1, 2, system.B.shape[-1], dtype=system.B.dtype).requires_grad_()

    def run(u, x, *leaves):
        system = LowRankSystem.bilinear(*leaves) if low_rank else LinearSystem(*leaves)
        return causal_convolution(u, system.kernel(5)), *system.advance(u, x)

    assert torch.autograd.gradcheck(run, (u, x, *leaves))


def test_float32_is_near_float64():
    """S4's kernel in float32 against float64: some ulps of the largest entry for each of log₂(L) squarings."""
    exact, k = low_rank_system(N=32).kernel(1024), low_rank_system(N=32, dtype=torch.float32).kernel(1024)
    assert k.dtype == torch.float32
    error = (k.double() - exact).abs().amax(-1) / exact.abs().amax(-1)
    assert (error < 100 * torch.finfo(torch.float32).eps).all(), error


def test_a_kernel_takes_memory_linear_in_its_length():
    """No tensor has H·N·L numbers: of all that is kept for the backward pass, the largest is H·L."""
    H, N, L = 4, 32, 4096
    A = torch.exp(torch.complex(-0.1 * normal(H, N).abs(), normal(H, N, seed=1))).requires_grad_()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        LinearSystem(A, torch.ones_like(A), torch.ones_like(A)).kernel(L)
    assert max(sizes) <= max(H * L, H * N * 64) < H * N * L / 16


@pytest.mark.parametrize(
    "change, message",
    [
        ({"L": 0}, "L must be at least 1, got 0"),
        ({"B": torch.ones(2, 4)}, "B must fit Lambda"),
        ({"P": torch.ones(3, 4)}, "P must fit Lambda"),
        ({"dt": torch.ones(3, 1)}, "dt must fit Lambda"),
    ],
)
def test_bad_input(change, message):
    one = torch.ones(3, 4, dtype=torch.complex64)
    arguments = {"Lambda": -one, "P": one[:, None], "B": one, "C": one, "dt": torch.ones(3), "L": 8}
    with pytest.raises(ValueError, match=message):
        cauchy_kernel(**(arguments | change))
