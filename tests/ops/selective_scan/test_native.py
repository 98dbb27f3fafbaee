"""The native kernels against the reference: in float64 over the whole space of calls, else at twice eager's error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import onchip
from onchip.ops import _native

from .support import F64, FEATURES, PER_TOKEN, assert_exact, case, forward, run
from .tolerance import assert_twice_eager

LOW = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {
    "one token": {"time": 1},
    "a chunk": {"time": 32},
    "63": {"time": 63, "channels": 20, "groups": 1},
    "many channels": {"batch": 1, "time": 40, "channels": 75, "groups": 1, "states": 5},
    "groups across vectors": {"time": 33, "channels": 44, "groups": 2, "states": 2},
    "a group for each channel": {"time": 34, "channels": 3, "groups": 3, "states": 1},
    "many states": {"batch": 1, "time": 20, "channels": 2, "states": 67},
    "no tokens": {"time": 0},
    "no sequences": {"batch": 0},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(backend, shape, feature):
    call = case(**SHAPES[shape], **FEATURES[feature])
    assert_exact(run(call, backend), run(call, "reference"))


@given(data=st.data())
@settings(max_examples=25)
def test_any_call(backend, data):
    draw = data.draw
    groups = draw(st.integers(1, 3))
    sizes = {
        "channels": groups * draw(st.integers(1, 40)),
        "groups": groups,
        "states": draw(st.integers(1, 20)),
        "seed": draw(st.integers(0, 9)),
    }
    if draw(st.booleans()):
        sizes["lengths"] = draw(st.lists(st.integers(0, 70), max_size=4))
    else:
        sizes |= {"batch": draw(st.integers(0, 2)), "time": draw(st.integers(0, 100))}
    call = case(**sizes, **FEATURES[draw(st.sampled_from(sorted(FEATURES)))])
    assert_exact(run(call, backend), run(call, "reference"))


LAYOUTS = {
    "time contiguous": lambda u: u.movedim(1, -1).contiguous().movedim(-1, 1),
    "turned around": lambda u: u.flip(1).contiguous().flip(1),
    "inside a larger tensor": lambda u: torch.cat([u, u * torch.nan], -1)[..., : u.shape[-1]],
    "every other token": lambda u: torch.stack([u, u * torch.nan], 2).flatten(1, 2)[:, ::2],
    "one batch for all": lambda u: u[:1].expand(u.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(backend, layout):
    call = case(time=50, channels=36, groups=2)
    tokens = {n: LAYOUTS[layout](call[n]) for n in PER_TOKEN}
    parameters = {"A": call["A"].T.contiguous().T, "D": torch.stack([call["D"]] * 2, 1)[:, 0]}
    strided = call.replace(**tokens, **parameters)
    strided = strided.replace(initial_state=call["initial_state"].transpose(1, 2).contiguous().transpose(1, 2))
    assert_exact(run(strided, backend), run(strided, "reference"))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_twice_eagers_error(backend, dtype, feature):
    assert_twice_eager(dtype, backend, time=100, channels=20, **FEATURES[feature])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_twice_eagers_error_under_strong_decay(backend, dtype):
    sizes = {"batch": 1, "channels": 2, "groups": 1, "states": 3, "decay": 20.0}
    assert_twice_eager(dtype, backend, time=1023, **sizes)
    assert_twice_eager(dtype, backend, gradients=False, time=8192, **sizes)


def test_steps_in_low_precision_are_as_good_as_the_scan(backend):
    for dtype in LOW:
        call = case(time=1, channels=40, groups=2, states=16).to(dtype)
        x, dt, B, C, z = (call[n][:, 0] for n in PER_TOKEN)
        more = {n: call[n] for n in ("D", "dt_bias", "dt_softplus")} | {"z": z}
        state = call["initial_state"].to(dtype)  # also in x's dtype
        y, h = onchip.selective_scan_step(x, state, dt, call["A"], B, C, **more, backend=backend)
        exact = onchip.selective_scan_step(
            *(u.double() for u in (x, state, dt, call["A"], B, C)),
            **{n: u.double() if n != "dt_softplus" else u for n, u in more.items()},
            backend="reference",
        )
        assert h.dtype == torch.float32 and y.dtype == dtype
        torch.testing.assert_close(h.double(), exact[1], rtol=1e-5, atol=1e-6)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), exact[0], rtol=max(eps, 1e-5), atol=1e-5)


@pytest.mark.parametrize("states", [1, 7, 16, 33])
def test_steps_of_any_shape_and_stride(backend, states):
    call = case(batch=3, time=2, channels=22, groups=2, states=states)
    x, dt, B, C, z = (LAYOUTS["time contiguous"](call[n])[:, 1] for n in PER_TOKEN)
    more = {n: call[n] for n in ("D", "dt_bias", "dt_softplus")} | {"z": z}
    A, state = call["A"].T.contiguous().T, call["initial_state"].transpose(1, 2).contiguous().transpose(1, 2)
    got = onchip.selective_scan_step(x, state, dt, A, B, C, **more, backend=backend)
    want = onchip.selective_scan_step(x, state, dt, A, B, C, **more, backend="reference")
    assert_exact(dict(enumerate(got)), dict(enumerate(want)))


def test_mixed_dtypes(backend):
    call = case(time=40).to(torch.bfloat16, parameters=torch.float16)
    call = call.replace(dt=call["dt"].float(), B=call["B"].half(), initial_state=call["initial_state"].float())
    got, want = run(call, backend), run(call, "reference")
    for n in want:
        assert got[n].dtype == want[n].dtype
        torch.testing.assert_close(got[n].float(), want[n].float(), rtol=0.02, atol=0.02 * float(want[n].abs().max()))


@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z", "initial_state"])
def test_nan_shows_where_it_is_read(backend, name):
    call = case(time=70, channels=20)
    u = call[name]
    u[(1, 33, 1) if name != "initial_state" else (1, 1, 1)] = torch.nan
    got, want = forward(call, backend), forward(call, "reference")
    assert got["out"].isnan().any()
    for n in got:
        assert torch.equal(got[n].isnan(), want[n].isnan())


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_decays_of_any_size(backend, dtype):
    A = torch.tensor([[-1e30, -1e4, -87.0, -1e-30, 0.0, -torch.inf]] * 3)
    call = case(batch=1, time=40, channels=3, groups=1, states=6).replace(A=A).to(dtype)
    got, want = run(call, backend), run(call, "reference")
    assert all(torch.equal(got[n].isnan(), want[n].isnan()) for n in got if n not in ("A", "dt", "dt_bias"))
    torch.testing.assert_close(got["out"], want["out"])
    torch.testing.assert_close(got["final_state"], want["final_state"])


@pytest.mark.parametrize("largest", [1.0, 83.0, 87.0])  # beyond 83.1 another way is taken, for 8 or 16 channels at once
def test_one_decay_is_an_exponential(backend, largest):
    exponents = torch.linspace(-largest, largest, 4096)
    one, none = torch.ones(1, 4096, 1), torch.zeros(1, 1, 1, 1)
    A = -torch.ones(4096, 1)
    call = {"initial_state": one, "return_final_state": True, "backend": backend}
    got = onchip.selective_scan(torch.zeros(1, 1, 4096), -exponents.view(1, 1, -1), A, none, none, **call)[1].flatten()
    error = (got.double() / exponents.double().exp() - 1).abs()
    assert (error <= torch.finfo(torch.float32).eps * (1.5 + exponents.abs())).all()


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
def test_threads_change_no_bits():
    call = case(batch=2, time=300, channels=150, groups=1, states=16).to(torch.float32)
    want = run(call, "cpu")
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            got = run(call, "cpu")
        finally:
            torch.set_num_threads(1)
        for n in want:
            assert torch.equal(got[n], want[n]), n
