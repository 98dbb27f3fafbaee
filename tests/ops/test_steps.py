"""The short way of the steps: it gives what the long one gives, and leaves to that whatever is out of the ordinary."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import onchip
from onchip.ops import _native, _step

pytestmark = pytest.mark.skipif(_native.missing is not None, reason="needs the native kernels")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
B, D, N, G = 2, 6, 5, 2


def calls(dtype=torch.float32):
    """Each step with all its terms, and its arguments; the first two are x_t and the state."""
    torch.manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shared = {"B_t": normal(B, G, N), "C_t": normal(B, G, N), "dt_softplus": True}
    scan = {"dt_t": normal(B, D), "A": -normal(D, N, dtype=wide).exp(), **shared}
    ssd = {"dt_t": normal(B, 4), "A": -normal(4, dtype=wide).exp(), **shared, "dt_limit": (0.01, 2.0)}
    x, heads = normal(B, D), normal(B, 4, 3)
    channels = {"D": normal(D), "z": normal(B, D), "dt_bias": normal(D)}
    per_head = {"D": normal(4), "z": normal(B, 4, 3), "dt_bias": normal(4)}
    weights = {"weight": normal(D, 4), "bias": normal(D), "activation": "silu"}
    return {
        onchip.causal_conv1d_step: {"x_t": x, "state": normal(B, 3, D), **weights},
        onchip.selective_scan_step: {"x_t": x, "state": normal(B, D, N, dtype=wide), **scan, **channels},
        onchip.ssd_step: {"x_t": heads, "state": normal(B, 4, 3, N, dtype=wide), **ssd, **per_head},
    }


STEPS = list(calls())


@pytest.fixture(params=STEPS, ids=lambda step: step.__name__)
def step(request):
    return request.param


@pytest.fixture
def short(monkeypatch):
    """Which calls the short way took: True and False, in order."""
    taken = []

    class Counting:
        def __getattr__(self, name):
            kernel = getattr(_native.kernels, name)
            return lambda *args: taken.append(kernel(*args)) or taken[-1]

    monkeypatch.setattr(_step, "kernels", Counting())
    return taken


def long_way(step, **arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_step, "_there", False)
        return step(**arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bare", [False, True], ids=["all terms", "bare"])
def test_both_ways_give_the_same(step, dtype, bare, short):
    arguments = calls(dtype)[step]
    if bare:
        optional = ("bias", "activation", "D", "z", "dt_bias", "dt_softplus", "dt_limit")
        arguments = {name: value for name, value in arguments.items() if name not in optional}
    state, before = arguments["state"], arguments["state"].clone()
    want, want_state = long_way(step, **arguments)
    y, new = step(**arguments)
    assert torch.equal(state, before) and new is not state and new.dtype == want_state.dtype
    version = state._version
    y_in_place, same = step(**arguments, out_state=state)
    assert same is state and state._version > version
    assert short == [True, True]
    for found in (y, y_in_place):
        assert found.dtype == dtype
        torch.testing.assert_close(found, want, rtol=0, atol=0)
    for found in (new, state):
        torch.testing.assert_close(found, want_state, rtol=0, atol=0)


def test_any_strides(step, short):
    arguments = calls()[step]
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            apart = value.new_full((*value.shape[::-1], 2), torch.nan)[..., 0].permute(*range(value.ndim)[::-1])
            arguments[name] = apart.copy_(value)
    want, want_state = long_way(step, **calls()[step])
    y, new = step(**arguments)
    assert short == [True]
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(new, want_state)


def test_a_state_in_the_dtype_of_x(step):
    arguments = calls(torch.bfloat16)[step]
    arguments["state"] = arguments["state"].bfloat16()
    want, want_state = long_way(step, **arguments)
    y, new = step(**arguments)
    assert torch.equal(y, want) and torch.equal(new, want_state) and new.dtype == want_state.dtype


def test_views_to_be_negated(step, short):
    arguments = calls()[step]
    x = arguments["x_t"]
    arguments["x_t"] = torch.complex(x, -x).conj().imag
    assert arguments["x_t"].is_neg()
    want, _ = long_way(step, **calls()[step])
    torch.testing.assert_close(step(**arguments)[0], want)
    assert short == [False]


def test_fake_and_meta_tensors_have_shapes_alone(step):
    arguments = calls()[step]
    want = step(**arguments)
    for mode, turn in ((FakeTensorMode(), None), (None, "meta")):
        turned = {
            name: (mode.from_tensor(value) if turn is None else value.to(turn))
            if isinstance(value, torch.Tensor)
            else value
            for name, value in arguments.items()
        }
        for x, expected in zip(step(**turned), want, strict=True):
            assert x.shape == expected.shape and x.dtype == expected.dtype


def test_a_mode_sees_the_call(step):
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watching():
        step(**calls()[step])
    assert any(name.startswith(f"onchip.{step.__name__}") for name in seen)


def test_gradients_are_not_lost(step):
    arguments = calls(torch.float64)[step]
    arguments["state"].requires_grad_()
    y, new = step(**arguments)
    assert y.requires_grad and new.requires_grad
    parameter = next(name for name in ("weight", "D") if name in arguments)
    arguments = {**arguments, "state": arguments["state"].detach(), parameter: torch.nn.Parameter(arguments[parameter])}
    assert step(**arguments)[0].requires_grad
    with torch.no_grad():
        assert not step(**arguments)[0].requires_grad


@pytest.mark.parametrize("name", ["x_t", "state", "out_state"])
def test_sparse_tensors_are_refused(step, name):
    arguments = calls()[step]
    dense = arguments["state" if name == "out_state" else name]
    with pytest.raises((RuntimeError, NotImplementedError, TypeError, ValueError)):
        step(**{**arguments, name: dense.to_sparse()})


def test_no_sequences(step, short):
    arguments = calls()[step]
    per_sequence = ("x_t", "state", "dt_t", "B_t", "C_t", "z")
    empty = {name: value[:0] if name in per_sequence else value for name, value in arguments.items()}
    y, new = step(**empty)
    assert short == [False] and len(y) == len(new) == 0
