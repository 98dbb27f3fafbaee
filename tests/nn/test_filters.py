import copy
import math
import re

import pytest
import torch

from onchip.nn import hippo
from onchip.nn.mixers import LSSL, S4, S4D, HiPPO, build_mixer
from onchip.nn.mixers import hippo as hippo_mixer
from onchip.testing import MIXER_CHECKS
from onchip.training.optimizer import adamw

VARIANTS = {
    "hippo": lambda: HiPPO(3, 4, chunk_size=8),
    "hippo, backward, in one chunk": lambda: HiPPO(3, 5, discretization="backward", chunk_size=64),
    "hippo, window": lambda: HiPPO(3, 4, measure="legt", dt=0.1, chunk_size=5),
    "hippo, decaying, zoh": lambda: HiPPO(3, 3, measure="lagt", dt=0.2, discretization="zoh", chunk_size=1),
    "hippo, Fourier": lambda: HiPPO(3, 4, measure="fourier", dt=0.05, discretization="backward"),
    "lssl": lambda: LSSL(3, 4),
    "lssl, learned, zoh": lambda: LSSL(3, 3, learn_transition=True, discretization="zoh", measure="legt"),
    "lssl, backward": lambda: LSSL(3, 4, discretization="backward", measure="fourier"),
    "s4": lambda: S4(3, 4),
    "s4, rank 2": lambda: S4(2, 4, measure="legt", dt_max=0.5),
    "s4d": lambda: S4D(3, 4),
    "s4d, inverse, bilinear": lambda: S4D(3, 4, init="inv", discretization="bilinear"),
    "s4d, linear": lambda: S4D(3, 6, init="lin"),
    "s4d, real": lambda: S4D(3, 3, init="real"),
    "s4d, real, bilinear, steps too long to decay monotonely": lambda: S4D(
        3, 3, init="real", discretization="bilinear", dt_min=1.0, dt_max=3.0
    ),
}


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("check", MIXER_CHECKS, ids=lambda check: check.__name__)
def test_conformance(check, make):
    check(make)


MIXERS = {name: VARIANTS[name] for name in ("hippo", "lssl", "s4", "s4d")}
each_mixer = pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def first_step(mixer, x_t, state):
    with torch.no_grad():
        return mixer.step(x_t, state)[0]


CHANGES = {
    "an optimizer's step": lambda mixer: torch.optim.SGD(mixer.parameters(), lr=0.1).step(),
    "a fused optimizer's step": lambda mixer: torch.optim.AdamW(mixer.parameters(), lr=0.1, fused=True).step(),
    "a write": lambda mixer: mixer.log_dt.add_(0.5),
    "another storage": lambda mixer: setattr(mixer.log_dt, "data", mixer.log_dt.data + 0.5),
    "another parameter": lambda mixer: setattr(mixer, "C", torch.nn.Parameter(mixer.C + 1)),
    "a state dict": lambda mixer: mixer.load_state_dict({name: x + 0.1 for name, x in mixer.state_dict().items()}),
    "to float32 and back": lambda mixer: mixer.float().double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("make", [MIXERS[name] for name in ("lssl", "s4", "s4d")], ids=["lssl", "s4", "s4d"])
def test_what_is_kept_for_steps_is_never_stale(make, change):
    mixer, x = make().double(), normal(1, 4, 3)
    with torch.no_grad():
        mixer.C.add_(1e-3 * normal(*mixer.C.shape))  # digits that float32 does not have
        _, state = mixer(x, mixer.initial_state(1))
    before = first_step(mixer, x[:, 0], state)
    mixer(x).sum().backward()
    with torch.no_grad():
        change(mixer)
    now = first_step(mixer, x[:, 0], state)
    fresh = copy.deepcopy(mixer)
    fresh._kept = None
    torch.testing.assert_close(now, first_step(fresh, x[:, 0], state), rtol=0, atol=0)
    assert not torch.equal(now, before)


def test_a_new_sequence_sees_writes_that_pytorch_does_not_count():
    mixer, x = S4D(3, 4).double(), normal(1, 3)
    before = first_step(mixer, x, mixer.initial_state(1))
    mixer.C.data.mul_(2)
    assert not torch.equal(first_step(mixer, x, mixer.initial_state(1)), before)


@pytest.mark.parametrize("name", ["lssl", "s4", "s4d"])
def test_evaluation_sees_writes_that_pytorch_does_not_count(name):
    """Those of a fused optimizer, for one, whether gradients were recorded since the evaluation before or not."""
    mixer, x = MIXERS[name]().double(), normal(1, 5, 3)

    def forms():
        with torch.no_grad():
            y, _ = mixer(x, mixer_state)
            return mixer(x), mixer.matrix(x), y, first_step(mixer, x[:, 0], mixer_state)

    mixer_state = mixer.initial_state(1)
    mixer(x).square().sum().backward()
    before = forms()
    torch.optim.AdamW(mixer.parameters(), lr=0.1, fused=True).step()
    for now, then in zip(forms(), before, strict=True):
        assert not torch.equal(now, then)
    with torch.no_grad():
        torch.testing.assert_close(forms()[0], copy.deepcopy(mixer)(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["lssl", "s4", "s4d"])
def test_steps_discretize_once(name, monkeypatch):
    mixer, calls = MIXERS[name](), []
    discretize = mixer._discretize
    monkeypatch.setattr(mixer, "_discretize", lambda: calls.append(0) or discretize())
    state = mixer.initial_state(2)
    with torch.no_grad():
        for _ in range(5):
            _, state = mixer.step(torch.randn(2, 3), state)
        assert len(calls) == 1
    mixer.step(torch.randn(2, 3), state)[0].sum().backward()
    assert len(calls) == 2


@each_mixer
def test_memory_is_constant(make):
    mixer = make()
    state = mixer.initial_state(2)
    nbytes = state.nbytes
    with torch.no_grad():
        _, state = mixer(torch.randn(2, 100, 3), state)
        _, state = mixer.step(torch.randn(2, 3), state)
    assert state.nbytes == nbytes


@each_mixer
def test_no_tokens_have_an_empty_matrix(make):
    assert make().matrix(torch.randn(2, 0, 3)).shape == (2, 3, 0, 0)


@each_mixer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(make, dtype):
    """States in float32; the output's error is that of rounded inputs, parameters and outputs."""
    mixer = make().to(dtype)
    x = normal(2, 40, 3).to(dtype)
    y, state = mixer(x, mixer.initial_state(2))
    assert y.dtype == dtype
    assert {t.dtype for t in state._tensors().values()} <= {torch.float32, torch.complex64, torch.int64}
    exact = mixer.double()(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps * exact.abs().max().item())


@each_mixer
def test_autocast_leaves_the_filters_alone(make):
    mixer, x = make(), normal(2, 40, 3, dtype=torch.float32)
    mixer.out = torch.nn.Identity()
    plain = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x, mixer.initial_state(2))
        y_t, _ = mixer.step(x[:, 0], state)
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y_t, mixer.step(x[:, 0], state)[0], rtol=1e-4, atol=1e-5)


@each_mixer
def test_compiles_whole(make):
    mixer, x = make(), normal(2, 20, 3, dtype=torch.float32)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mixer(x))


@each_mixer
def test_weight_decay_leaves_rates_and_transitions_alone(make):
    mixer = make()
    _, spared = adamw(mixer, 0.1).param_groups
    spared = {id(parameter) for parameter in spared["params"]}
    decayed = {name for name, parameter in mixer.named_parameters() if id(parameter) not in spared}
    assert decayed == {"C", "out.weight"}


def test_a_long_sequence_crosses_the_matrices_kept_together(monkeypatch):
    monkeypatch.setattr(hippo_mixer, "_KEPT", 2)
    mixer = HiPPO(3, 4, chunk_size=3).double()
    other = HiPPO(3, 4, chunk_size=64).double()
    other.load_state_dict(mixer.state_dict())
    x = normal(2, 50, 3)
    torch.testing.assert_close(mixer(x), other(x), rtol=1e-10, atol=1e-10)


def test_a_hippo_mixer_holds_hippos_coefficients():
    mixer, x = HiPPO(2, 6).double(), normal(1, 30, 2)
    _, state = mixer(x, mixer.initial_state(1))
    c = torch.zeros(1, 2, 6, dtype=torch.float64)
    for t in range(30):
        c = hippo.legs_update(c, x[:, t], t + 1)
    torch.testing.assert_close(state.c, c, rtol=1e-12, atol=1e-12)


def test_what_is_kept_in_inference_mode_serves_training():
    mixer = HiPPO(3, 4, chunk_size=7)  # a chunk of its own, so that no other test has made its matrices
    with torch.inference_mode():
        mixer(torch.randn(1, 9, 3))
    mixer(torch.randn(1, 9, 3)).sum().backward()


def test_starts_as_published():
    """Steps start between dt_min and dt_max, and S4D's eigenvalues as published."""
    mixer = S4D(1000, 8, init="inv")
    assert math.log(0.001) <= mixer.log_dt.min() < math.log(0.0012) and math.log(0.09) < mixer.log_dt.max()
    assert mixer.log_dt.max() <= math.log(0.1)
    n = torch.arange(4)
    torch.testing.assert_close(mixer.frequency[0], 8 / torch.pi * (8 / (2 * n + 1) - 1))
    torch.testing.assert_close(S4D(1, 8, init="lin").frequency[0], torch.pi * n)
    torch.testing.assert_close(S4D(1, 8, init="real").log_decay[0].exp(), torch.arange(1.0, 9))
    for init in ("legs", "inv", "lin"):
        torch.testing.assert_close(S4D(1, 8, init=init).log_decay.exp(), torch.full((1, 4), 0.5))


def test_s4ds_inverse_law_approaches_legs():
    """The highest frequencies of "inv" are those of LegS the more nearly, the more states there are."""

    def deviation(N):
        legs, inv = (S4D(1, N, init=init).frequency[0].sort().values[-4:] for init in ("legs", "inv"))
        return ((inv - legs) / legs).abs()

    assert (deviation(16) < 0.25).all()
    assert (deviation(64) < deviation(16) / 2).all()
    assert (deviation(256) < deviation(64) / 2).all()


def test_the_zero_order_hold_of_s4d_is_exact():
    mixer = S4D(3, 4).double()
    A, B, _ = mixer._discretize()
    decay, frequency, dt = mixer.log_decay.exp(), mixer.frequency, mixer.log_dt.exp()
    continuous = torch.diag_embed(torch.complex(-decay, frequency))
    exact = hippo.discretize(continuous, torch.ones_like(continuous[..., 0]), dt, "zoh")
    torch.testing.assert_close((torch.diag_embed(A), B), tuple(exact), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: S4(4, 5), "d_state must be even, got 5"),
        (lambda: S4(4, 0), "d_state must be at least 1, got 0"),
        (lambda: LSSL(4, 0), "d_state must be at least 1, got 0"),
        (lambda: S4(4, 4, measure="leg"), "measure must be one of legs, legt, lagt, fourier, got 'leg'"),
        (
            lambda: S4(4, 4, dt_min=0.1, dt_max=0.01),
            "dt_min and dt_max must be positive and in order, got 0.1 and 0.01",
        ),
        (lambda: S4D(4, 4, dt_min=0.0), "dt_min and dt_max must be positive"),
        (lambda: S4D(4, 4, init="exp"), "init must be one of legs, inv, lin, real, got 'exp'"),
        (lambda: S4D(4, 4, discretization="euler"), "discretization must be zoh or bilinear, got 'euler'"),
        (lambda: S4D(4, 5, init="lin"), "d_state must be even"),
        (lambda: LSSL(4, 4, discretization="forward"), "bilinear, backward or zoh, got 'forward'"),
        (lambda: HiPPO(4, 4, discretization="zoh"), "discretization must be one of bilinear, backward, got 'zoh'"),
        (lambda: HiPPO(4, 4, dt=0.1), 'dt must be positive, or None with measure "legs", got 0.1'),
        (lambda: HiPPO(4, 4, measure="legt"), "dt must be positive"),
        (lambda: HiPPO(4, 4, measure="legt", dt=-1.0), "dt must be positive"),
        (lambda: HiPPO(4, 4, chunk_size=0), "chunk_size must be at least 1, got 0"),
        (lambda: HiPPO(4, 3, measure="fourier", dt=0.1), "N must be even"),
        (lambda: S4D(0), "d_model must be at least 1, got 0"),
        (lambda: build_mixer(4, {"mixer": "s4d", "states": 4}), "s4d has no argument states"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("kind", [HiPPO, LSSL, S4, S4D])
def test_sizes_are_integers(kind):
    with pytest.raises(TypeError, match="d_model must be an integer, got float"):
        kind(4.0)
    with pytest.raises(TypeError, match="d_state must be an integer, got float"):
        kind(4, 8.0)


@each_mixer
def test_bad_input(make):
    mixer = make()
    x = torch.randn(2, 5, 3)
    for state in (mixer.initial_state(3), make().double().initial_state(2)):
        for call in (lambda state=state: mixer(x, state), lambda state=state: mixer.step(x[:, 0], state)):
            with pytest.raises(ValueError, match=r"state must be of the input's rows and of this mixer, \(2, 3, "):
                call()
    with pytest.raises(ValueError, match=r"x_t must be \(B, d_model\) with d_model = 3, got \(2, 4\)"):
        mixer.step(torch.randn(2, 4), mixer.initial_state(2))
    with pytest.raises(ValueError, match="cu_seqlens"):
        mixer(x[0], cu_seqlens=torch.tensor([0, 3, 2, 5]))
    with pytest.raises(TypeError, match="cu_seqlens"):
        mixer(x[0], cu_seqlens=torch.tensor([0.0, 5.0]))
