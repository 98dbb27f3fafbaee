"""causal-conv1d's functions: its layouts and options, held to its own formulas; and `import causal_conv1d`."""

import importlib
import importlib.metadata
import inspect
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu

from onchip.integrations import causal_conv1d
from onchip.integrations.causal_conv1d import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from onchip.ops.causal_conv1d import op

LAYOUTS = {"contiguous": lambda x: x, "channels last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)}


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, active: bool) -> Tensor:
    """(B, D, T) as one writes it in PyTorch."""
    before = x.new_zeros(*x.shape[:2], weight.shape[1] - 1) if state is None else state
    y = conv1d(torch.cat([before, x], 2), weight[:, None], bias, groups=len(weight))
    return silu(y) if active else y


def inputs(batch: int, channels: int, length: int, width: int, dtype=torch.float64) -> tuple[Tensor, ...]:
    shapes = (batch, channels, length), (channels, width), (channels,), (batch, channels, width - 1)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 2, 8, 151, 372])
@pytest.mark.parametrize("width", [2, 4])
def test_forward_and_backward(width, length, layout, dtype):
    tensors = inputs(2, 100, length, width, dtype)
    leaves = [LAYOUTS[layout](t).requires_grad_() if t.ndim == 3 else t.requires_grad_() for t in tensors]
    x, weight, bias, state = leaves
    out, final = causal_conv1d_fn(x, weight, bias, None, state, True, None, "silu")
    assert final.shape == state.shape and torch.equal(final, torch.cat([state, x], 2)[..., length:])
    if length > 1:
        assert out.stride(1 if layout == "channels last" else 2) == 1
    weights = torch.randn_like(out)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    low = [t.detach().requires_grad_() for t in tensors]
    exact, eager = plain(*wide, True), plain(*low, True)
    results = [[out, *torch.autograd.grad(out, leaves, weights)]]
    results += [[y, *torch.autograd.grad(y, t, weights.to(y.dtype))] for y, t in ((exact, wide), (eager, low))]
    for got, want, other in zip(*results, strict=True):
        slack = 2 * (other.double() - want).abs().max() + torch.finfo(dtype).eps * want.abs()
        growth = 30 * torch.finfo(torch.float32).eps * want.abs().max()
        assert ((got.double() - want).abs() <= slack + growth).all()


def test_final_states_are_written_where_they_are_wanted():
    x, weight, _, state = inputs(2, 3, 5, 4)
    place = torch.empty(2, 3, 3, dtype=x.dtype).transpose(1, 2)
    out, final = causal_conv1d_fn(x, weight, initial_states=state, return_final_states=True, final_states_out=place)
    assert final is place and torch.equal(place, x[..., 2:])
    torch.testing.assert_close(out, plain(x, weight, None, state, False))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_seq_idx(layout):
    x, weight, bias, _ = inputs(2, 3, 12, 4)
    x = LAYOUTS[layout](x).requires_grad_()
    seq_idx = torch.tensor([[0] * 5 + [1] * 2 + [2] * 5, [3] * 4 + [4] * 6 + [-1] * 2], dtype=torch.int32)
    out = causal_conv1d_fn(x, weight, bias, seq_idx, activation="swish")
    spans = [(0, 0, 5), (0, 5, 7), (0, 7, 12), (1, 0, 4), (1, 4, 10)]
    for b, start, end in spans:
        want = plain(x[b, None, :, start:end], weight, bias, None, True)
        torch.testing.assert_close(out[b, None, :, start:end], want)
    assert not out[1, :, 10:].any()
    (grad,) = torch.autograd.grad(out.sum(), x)
    want = sum(plain(x[b, None, :, start:end], weight, bias, None, True).sum() for b, start, end in spans)
    torch.testing.assert_close(grad, torch.autograd.grad(want, x)[0])


@pytest.mark.parametrize("length", [None, 1, 3, 9])
@pytest.mark.parametrize("width, size", [(4, 3), (4, 4), (2, 5), (1, 2), (3, 6)])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("ring", [False, True])
def test_update(ring, pool, width, size, length):
    x, weight, bias, _ = inputs(3, 5, length or 1, width, torch.float32)
    rows = torch.tensor([6, 2, 4]) if pool else torch.arange(3)
    lengths = torch.tensor([2, 9, 14], dtype=torch.int32)
    memory = torch.randn(7 if pool else 3, 5, size)
    state = memory.clone()
    out = causal_conv1d_update(
        x if length else x[..., 0],
        state,
        weight,
        bias,
        "silu",
        cache_seqlens=lengths if ring else None,
        conv_state_indices=rows.int() if pool else None,
    )
    for b, row in enumerate(rows):
        turn = int(lengths[b]) % size if ring else 0
        in_order = torch.cat([memory[row].roll(-turn, 1), x[b]], 1)
        want = plain(in_order[None, :, size - width + 1 :], weight, bias, None, True)[0, :, width - 1 :]
        torch.testing.assert_close(out[b], want if length else want[:, 0])
        kept = in_order[:, -size:]
        turn = (int(lengths[b]) + x.shape[2]) % size if ring else 0
        assert torch.equal(state[row], kept.roll(turn, 1))
    untouched = [i for i in range(len(memory)) if i not in rows.tolist()]
    assert torch.equal(state[untouched], memory[untouched])


def test_update_leaves_padding_alone():
    x, weight, _, _ = inputs(3, 5, 1, 4)
    state = torch.randn(4, 5, 3, dtype=x.dtype)
    before = state.clone()
    rows = torch.tensor([2, -1, 0], dtype=torch.int32)
    out = causal_conv1d_update(x[..., 0], state, weight, conv_state_indices=rows)
    assert not out[1].any() and out[0].any() and out[2].any()
    assert torch.equal(state[[1, 3]], before[[1, 3]]) and torch.equal(state[2], torch.cat([before[2, :, 1:], x[0]], 1))


def test_update_passes_gradients():
    x, weight, bias, state = (t.requires_grad_() for t in inputs(2, 3, 1, 4))
    out = causal_conv1d_update(x, state * 1.0, weight, bias, "silu")
    want = plain(x, weight, bias, state, True)
    torch.testing.assert_close(out, want)
    leaves = (x, weight, bias, state)
    for got, expected in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (out, want)), strict=True):
        torch.testing.assert_close(got, expected)


def test_varlen_states():
    x = torch.randn(9, 4)
    states = causal_conv1d_varlen_states(x, torch.tensor([0, 2, 2, 9], dtype=torch.int32), 4)
    assert states.shape == (3, 4, 4)
    assert torch.equal(states[0], torch.cat([torch.zeros(4, 2), x[:2].t()], 1))
    assert not states[1].any() and torch.equal(states[2], x[5:].t())


X, WEIGHT, STATE = torch.randn(2, 3, 5), torch.randn(3, 4), torch.randn(2, 3, 4)
WRONG = {
    "two dimensions": (lambda: causal_conv1d_fn(X[0], WEIGHT), r"x must have shape \(B, D, T\), got \(3, 5\)"),
    "channels": (lambda: causal_conv1d_fn(X, WEIGHT[:2]), r"weight must have shape \(3, W\), got \(2, 4\)"),
    "activation": (lambda: causal_conv1d_fn(X, WEIGHT, activation="gelu"), "activation must be None, 'silu' or"),
    "states": (
        lambda: causal_conv1d_fn(X, WEIGHT, initial_states=STATE[..., :2]),
        r"initial_states must have shape \(2, 3, 3\), got \(2, 3, 2\)",
    ),
    "place of no states": (lambda: causal_conv1d_fn(X, WEIGHT, final_states_out=STATE), "final_states_out is only"),
    "place": (
        lambda: causal_conv1d_fn(X, WEIGHT, return_final_states=True, final_states_out=STATE),
        r"final_states_out must have shape \(2, 3, 3\), got \(2, 3, 4\)",
    ),
    "seq_idx and states": (
        lambda: causal_conv1d_fn(X, WEIGHT, seq_idx=torch.zeros(2, 5).int(), return_final_states=True),
        "seq_idx goes with neither initial_states nor return_final_states, got return_final_states=True",
    ),
    "seq_idx": (
        lambda: causal_conv1d_fn(X, WEIGHT, seq_idx=torch.zeros(5).int()),
        r"seq_idx must have shape \(2, 5\), got \(5,\)",
    ),
    "floating seq_idx": (lambda: causal_conv1d_fn(X, WEIGHT, seq_idx=torch.zeros(2, 5)), "seq_idx must be an int32"),
    "short state": (
        lambda: causal_conv1d_update(X[..., 0], STATE[..., :2], WEIGHT),
        r"conv_state must hold at least W - 1 = 3 inputs, got shape \(2, 3, 2\)",
    ),
    "state": (lambda: causal_conv1d_update(X, STATE[:1], WEIGHT), r"conv_state must have shape \(2, 3, S\), got \(1,"),
    "lengths": (
        lambda: causal_conv1d_update(X, STATE, WEIGHT, cache_seqlens=torch.zeros(3).int()),
        r"cache_seqlens must have shape \(2,\), got \(3,\)",
    ),
    "floating rows": (
        lambda: causal_conv1d_update(X, STATE, WEIGHT, conv_state_indices=torch.zeros(2)),
        "conv_state_indices must be an int32 or int64 tensor, got torch.float32",
    ),
    "update of no tensor": (lambda: causal_conv1d_update([1], STATE, WEIGHT), "x must be a tensor, got list"),
    "fractional state_len": (
        lambda: causal_conv1d_varlen_states(X[0], torch.tensor([0, 3]), 2.5),
        "state_len must be an integer, got float",
    ),
    "state_len": (lambda: causal_conv1d_varlen_states(X[0], torch.tensor([0, 3]), -1), "state_len must be at least 0"),
}


@pytest.mark.parametrize("call, message", WRONG.values(), ids=WRONG)
def test_refuses(call, message, monkeypatch):
    monkeypatch.setattr(op, "causal_conv1d", None)  # nothing is computed
    with pytest.raises((ValueError, TypeError), match=message):
        call()


PUBLISHED = {
    causal_conv1d_fn: "x weight bias=None seq_idx=None initial_states=None return_final_states=False "
    "final_states_out=None activation=None",
    causal_conv1d_update: "x conv_state weight bias=None activation=None cache_seqlens=None conv_state_indices=None",
    causal_conv1d_varlen_states: "x cu_seqlens state_len",
}


@pytest.mark.parametrize("function, published", PUBLISHED.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_signature_is_the_published_one(function, published):
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    assert " ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters) == published


@pytest.fixture
def installed():
    before = set(sys.modules)
    causal_conv1d.install()
    yield importlib.import_module("causal_conv1d")
    causal_conv1d.uninstall()
    assert [type(finder).__name__ for finder in sys.meta_path].count("_Finder") == 0
    assert not [name for name in sys.modules if name.startswith("causal_conv1d") and name not in before]


def test_import_finds_onchip(installed):
    assert installed.causal_conv1d_fn is causal_conv1d_fn and installed.causal_conv1d_update is causal_conv1d_update
    interface = importlib.import_module("causal_conv1d.causal_conv1d_interface")
    varlen = importlib.import_module("causal_conv1d.causal_conv1d_varlen")
    assert interface.causal_conv1d_fn is causal_conv1d_fn
    assert varlen.causal_conv1d_varlen_states is causal_conv1d_varlen_states
    assert installed.__spec__.name == "causal_conv1d"
    assert installed.__version__ == importlib.metadata.version("causal-conv1d") == causal_conv1d.__version__
    assert importlib.metadata.packages_distributions()["causal_conv1d"] == ["causal-conv1d"]
    assert not hasattr(installed, "install")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("causal_conv1d.cpp_functions")


def test_transformers_finds_it(installed):
    """As its models ask, at their import: the kernels of a Mamba-2 of random weights, and the same logits."""
    hub = pytest.importorskip("transformers.integrations.hub_kernels")
    if not hasattr(hub, "use_kernel_func_from_hub_with_fallback"):
        pytest.skip("an older transformers asks in another way")
    calls = []

    @hub.use_kernel_func_from_hub_with_fallback("causal_conv1d_fn", "causal_conv1d")
    def causal_conv1d_fn(hidden_states, weight, bias=None, activation=None, **kwargs):
        calls.append("their own")

    x, weight, bias, _ = inputs(2, 3, 5, 4)
    out = causal_conv1d_fn(x, weight, bias, activation="silu", seq_idx=None, position_ids=None)
    torch.testing.assert_close(out, plain(x, weight, bias, None, True))
    assert not calls


def test_installed_beside_flash_attn(installed):
    from onchip.integrations import flash_attn

    flash_attn.install()
    assert importlib.import_module("flash_attn").flash_attn_func is flash_attn.flash_attn_func
    flash_attn.uninstall()
    assert importlib.import_module("causal_conv1d") is installed
