import math

import pytest
import torch
from torch.nn import functional as F

from onchip.nn.mixers import Mamba, Mamba2, build_mixer
from onchip.testing import MIXER_CHECKS

VARIANTS = {
    "mamba": lambda: Mamba(4, d_state=3),
    "mamba, biased, wide taps": lambda: Mamba(3, d_state=2, d_conv=5, dt_rank=2, bias=True, dt_init="constant"),
    "mamba, one tap, one state": lambda: Mamba(6, d_state=1, d_conv=1, expand=1, conv_bias=False),
    "mamba2": lambda: Mamba2(4, d_state=4, head_dim=4),
    "mamba2, groups, chunks": lambda: Mamba2(4, d_state=3, head_dim=2, n_groups=2, chunk_size=5, bias=True),
    "mamba2, norm before gate, limits": lambda: Mamba2(
        4, d_state=2, head_dim=4, norm_before_gate=True, dt_limit=(0.01, None), dt_min=0.02, dt_max=1.0
    ),
    "mamba2, one tap": lambda: Mamba2(5, d_state=1, d_conv=1, expand=1, head_dim=1, conv_bias=False),
}


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("check", MIXER_CHECKS, ids=lambda check: check.__name__)
def test_conformance(check, make):
    check(make)


PLAIN = {"mamba": lambda **given: Mamba(16, **given), "mamba2": lambda **given: Mamba2(16, head_dim=8, **given)}


@pytest.fixture(params=PLAIN)
def plain(request):
    return PLAIN[request.param]


def test_they_begin_as_published(plain):
    mixer = plain(dt_min=0.01, dt_max=0.05)
    dt = F.softplus(mixer.dt_bias)
    assert 0.01 * (1 - 1e-5) <= dt.min() < dt.max() <= 0.05 * (1 + 1e-5)
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))
    at_floor = F.softplus(plain(dt_min=1e-7, dt_max=1e-6, dt_init_floor=1e-3).dt_bias)
    torch.testing.assert_close(at_floor, torch.full_like(at_floor, 1e-3))


def test_rates_begin_as_published():
    A = Mamba(16, d_state=5).A_log.exp()
    torch.testing.assert_close(A, torch.arange(1.0, 6).repeat(32, 1))
    A = Mamba2(256, head_dim=2, A_init_range=(2, 3)).A_log.exp()
    assert 2 <= A.min() < 2.1 and 2.9 < A.max() <= 3


def test_dt_projection_begins_at_its_scale():
    weight = Mamba(64, dt_init="constant", dt_scale=0.5).dt_proj.weight
    assert torch.equal(weight, torch.full_like(weight, 0.25))
    assert 0.4 < Mamba(64, dt_rank=4).dt_proj.weight.abs().max() <= 0.5


def test_the_memory_stays_as_it_is(plain):
    mixer = plain()
    state = mixer.initial_state(2)
    size = state.nbytes
    with torch.inference_mode():
        _, state = mixer(torch.randn(2, 300, 16), state)
        for _ in range(20):
            _, state = mixer.step(torch.randn(2, 16), state)
    assert state.nbytes == size
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in (state.conv, state.ssm))  # no view of more


def test_an_expendable_state_is_written_in_place_but_where_gradients_are_recorded(plain):
    mixer = plain()
    state = mixer.initial_state(2)
    with torch.no_grad():
        _, after = mixer.step(torch.randn(2, 16), state)
        assert not state.ssm.any() and after.ssm.data_ptr() != state.ssm.data_ptr()
        mine = after.expendable()
        _, later = mixer.step(torch.randn(2, 16), mine)
        assert (later.ssm.data_ptr(), later.conv.data_ptr()) == (mine.ssm.data_ptr(), mine.conv.data_ptr())
        assert mixer.step(torch.randn(2, 16), later.reorder(torch.tensor([1, 0])))[1].may_be_overwritten
    assert mixer.step(torch.randn(2, 16), later)[1].ssm.data_ptr() != later.ssm.data_ptr()
    with torch.inference_mode():
        inside = mixer.initial_state(2).expendable()
    with torch.no_grad():
        assert not inside.may_be_overwritten


def test_numbers_of_memory():
    state = Mamba(16, d_state=8, d_conv=3).initial_state(1)
    assert (state.conv.shape, state.ssm.shape) == ((1, 2, 32), (1, 32, 8))
    state = Mamba2(16, d_state=8, d_conv=3, head_dim=4, n_groups=2).initial_state(1)
    assert (state.conv.shape, state.ssm.shape) == ((1, 2, 32 + 2 * 2 * 8), (1, 8, 4, 8))


def test_limits_bound_the_step():
    """With dt held at one value, two inputs differ in nothing that dt could tell."""
    mixer = Mamba2(16, head_dim=8, dt_limit=(0.3, 0.3)).double()
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    before = mixer(x)
    with torch.no_grad():
        mixer.dt_bias.add_(1.0)
    assert torch.equal(mixer(x), before)
    mixer.dt_limit = None
    assert not torch.allclose(mixer(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(plain, dtype):
    """The error is that of rounding between the operations, which eager PyTorch has, too."""
    mixer = plain().to(dtype)
    x = torch.randn(2, 40, 16).to(dtype)
    y, state = mixer(x, mixer.initial_state(2))
    assert (y.dtype, state.conv.dtype, state.ssm.dtype) == (dtype, dtype, torch.float32)
    exact = mixer.double()(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=32 * torch.finfo(dtype).eps * exact.abs().max().item())


def test_autocast_decodes_in_low_precision(plain):
    mixer = plain()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, state = mixer(torch.randn(2, 9, 16), mixer.initial_state(2))
        assert (state.conv.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)
        y, state = mixer.step(torch.randn(2, 16), state)
    assert y.isfinite().all()


def test_a_config_names_them():
    assert isinstance(build_mixer(8, {"mixer": "mamba", "d_state": 4}), Mamba)
    assert build_mixer(8, {"mixer": "mamba2", "head_dim": 4, "dt_limit": [0.1, None]}).dt_limit == (0.1, math.inf)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.randn(2, 5, 7)), r"d_model = 16, got \(2, 5, 7\)"),
        (
            lambda m: m.step(torch.randn(2, 1, 16), m.initial_state(2)),
            r"x_t must be \(B, d_model\) .* got \(2, 1, 16\)",
        ),
        (lambda m: m(torch.randn(2, 5, 16), m.initial_state(3)), r"initial_state must have shape \(2, 3,"),
        (lambda m: m.step(torch.randn(2, 16), m.initial_state(3)), r"state must have shape \(2, 3,"),
        (lambda m: m(torch.randn(5, 16), cu_seqlens=torch.tensor([0, 9, 5])), "cu_seqlens"),
    ],
)
def test_bad_input(plain, call, message):
    with pytest.raises(ValueError, match=message):
        call(plain())


def test_who_has_a_second_derivative_is_named(plain):
    mixer, x = plain(), torch.randn(1, 5, 16, requires_grad=True)
    (first,) = torch.autograd.grad(mixer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative; onchip\.\w+\(…, backend='reference'\) has one"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Mamba, {"d_state": 0}, "d_state must be at least 1, got 0"),
        (Mamba, {"d_conv": 0}, "d_conv must be at least 1"),
        (Mamba, {"dt_rank": 0}, "dt_rank must be at least 1"),
        (Mamba, {"dt_init": "zero"}, 'dt_init must be "random" or "constant", got \'zero\''),
        (Mamba, {"dt_min": 0.2}, "dt_min and dt_max must be positive and ascending, got 0.2 and 0.1"),
        (Mamba, {"dt_init_floor": 0.0}, "dt_init_floor must be positive"),
        (Mamba, {"d_state": 1.5}, "d_state must be an integer, got float"),
        (Mamba, {"dt_rank": "big"}, "dt_rank must be an integer, got str"),
        (Mamba2, {"head_dim": 8, "d_state": 1.5}, "d_state must be an integer, got float"),
        (Mamba2, {"head_dim": 8, "n_groups": 1.0}, "n_groups must be an integer, got float"),
        (Mamba2, {"head_dim": 8, "chunk_size": 4.0}, "chunk_size must be an integer, got float"),
        (Mamba2, {"head_dim": 8, "norm_eps": -1.0}, "norm_eps must be finite and not negative, got -1.0"),
        (Mamba2, {"head_dim": 8, "norm_eps": float("nan")}, "norm_eps must be finite and not negative, got nan"),
        (Mamba2, {"expand": 0}, "expand must be at least 1"),
        (Mamba2, {"head_dim": 5}, "head_dim must divide expand · d_model = 32, got 5"),
        (Mamba2, {"head_dim": 8, "n_groups": 3}, "n_groups must divide the 4 heads, got 3"),
        (Mamba2, {"head_dim": 8, "chunk_size": 0}, "chunk_size must be at least 1"),
        (Mamba2, {"head_dim": 8, "A_init_range": (0, 1)}, "A_init_range must be positive and ascending"),
        (Mamba2, {"head_dim": 8, "dt_limit": (0.5, 0.1)}, "dt_limit must be .* low ≤ high"),
        (Mamba2, {"head_dim": 8, "dt_limit": (0.5,)}, "dt_limit must be"),
    ],
)
def test_bad_arguments(kind, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        kind(16, **arguments)
