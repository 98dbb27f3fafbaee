import pytest
import torch

from onchip.nn.mixers import MIXERS, Attention, MissingForm, build_mixer
from onchip.ops.attention import reference
from onchip.testing import MIXER_CHECKS

VARIANTS = {
    "plain": {},
    "grouped, windowed, sinks": {"n_kv_heads": 2, "window": (5, 0), "sinks": True},
    "multi-query, biased": {"n_kv_heads": 1, "bias": True, "head_dim": 6},
    "no positions, window from the right alone": {
        "causal": False,
        "window": (None, 0),
        "rope_base": None,
        "head_dim": 3,
    },
    "bidirectional": {"causal": False, "sinks": True},
    "bidirectional, windowed": {"causal": False, "window": (4, 2), "n_kv_heads": 2},
}


@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("check", MIXER_CHECKS, ids=lambda check: check.__name__)
def test_conformance(check, arguments):
    check(lambda: Attention(8, n_heads=4, **arguments))


def test_positions_are_relative():
    """Where no query sees the first tokens, leaving them out changes nothing: rotary angles count differences."""
    mixer = Attention(16, n_heads=2, window=(3, 0)).double()
    x = torch.randn(1, 60, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[:, 30:], mixer(x[:, 27:])[:, 3:], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(mixer(x)[:, 30:], mixer(x[:, 29:])[:, 1:])


def test_zero_sinks_take_the_probability_of_one_key_of_zero_logit():
    mixer = Attention(8, n_heads=2, sinks=True).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    q, k, _ = mixer._project(x, slice(5), 5)
    _, lse = reference.attention_matrix(q, k, right=0)
    torch.testing.assert_close(mixer.matrix(x).sum(-1), 1 - 1 / (1 + lse.exp()))


def steps(mixer, state, n):
    with torch.no_grad():
        for _ in range(n):
            _, state = mixer.step(torch.randn(state.keys.shape[0], mixer.d_model), state)
    return state


def test_a_window_bounds_the_memory():
    mixer = Attention(16, n_heads=2, window=(20, 0))
    with torch.no_grad():
        _, state = mixer(torch.randn(1, 500, 16), mixer.initial_state(1))
    late = steps(mixer, state, 1000)
    assert late.position == 1500
    for held in (state, steps(mixer, state, 50), late):
        assert held.nbytes <= 2 * 4 * 16 * (2 * 21 + 16)
        assert held.keys.untyped_storage().nbytes() == held.keys.nbytes  # no view of more


def test_steps_copy_the_cache_rarely():
    mixer = Attention(16, n_heads=2)
    state, buffers = mixer.initial_state(1), set()
    for _ in range(1000):
        state = steps(mixer, state, 1)
        buffers.add(id(state._fill))
    assert len(buffers) <= 12  # 16 · 1.5^11 > 1000


def test_a_state_made_without_gradients_carries_them_on():
    """Truncated back-propagation after a prefill nobody differentiates: the cache is not written in place."""
    mixer = Attention(16, n_heads=2).double()
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    with torch.no_grad():
        _, state = mixer(x[:, :4], mixer.initial_state(1))
    y, state = mixer(x[:, 4:8], state)
    with torch.no_grad():
        mixer(x[:, 8:], state)
    y.sum().backward()
    assert mixer.qkv.weight.grad.isfinite().all()


def test_inference_mode_leaves_nothing_behind():
    """The rotary table made in inference mode serves a training step."""
    mixer = Attention(16, n_heads=2, rope_base=1234.5)  # a base of its own, so that no other test has made the table
    with torch.inference_mode():
        mixer(torch.randn(1, 9, 16))
    mixer(torch.randn(1, 9, 16)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    mixer = Attention(16, n_heads=2).to(dtype)
    x = torch.randn(2, 9, 16).to(dtype)
    y, state = mixer(x, mixer.initial_state(2))
    assert y.dtype == state.keys.dtype == dtype
    exact = mixer.double()(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=32 * torch.finfo(dtype).eps * exact.abs().max().item())


def test_autocast_decodes_in_low_precision():
    mixer = Attention(16, n_heads=2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(torch.randn(2, 9, 16), mixer.initial_state(2))
        assert state.keys.dtype == torch.bfloat16 and state.keys.shape[0] == 2
        y, state = mixer.step(torch.randn(2, 16), state)
    assert y.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.randn(2, 5, 7)), r"d_model = 8, got \(2, 5, 7\)"),
        (lambda m: m(torch.randn(5, 8)), r"\(B, T, d_model\)"),
        (lambda m: m(torch.randn(2, 5, 8), cu_seqlens=torch.tensor([0, 5])), r"\(total, d_model\)"),
        (lambda m: m(torch.randn(5, 8), m.initial_state(1), cu_seqlens=torch.tensor([0, 5])), "exclude each other"),
        (lambda m: m(torch.randn(2, 5, 8), m.initial_state(3)), "3 rows, the input 2"),
        (lambda m: m(torch.randn(5, 8), cu_seqlens=torch.tensor([0, 9, 5])), "cu_seqlens_q"),
        (lambda m: m(torch.randn(5, 8), cu_seqlens=torch.tensor([0, 9])), "cu_seqlens_q"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(Attention(8, n_heads=2))


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_boundaries_are_integers(name):
    mixer = MIXERS[name](8, **{"attention": {"n_heads": 2}, "mamba2": {"head_dim": 4}}.get(name, {}))
    with pytest.raises(TypeError, match=r"cu_seqlens must be an int32 or int64 tensor, got torch\.float32"):
        mixer(torch.randn(5, 8), cu_seqlens=torch.tensor([0.0, 5.0]))
    with pytest.raises(ValueError, match=r"cu_seqlens must have shape \(sequences \+ 1,\), got \(1, 2\)"):
        mixer(torch.randn(5, 8), cu_seqlens=torch.tensor([[0, 5]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_heads": 3}, "multiple of n_heads"),
        ({"n_heads": 4, "n_kv_heads": 3}, "multiple of n_kv_heads, got 4 and 3"),
        ({"n_heads": 0}, "n_heads must be at least 1, got 0"),
        ({"n_heads": 2.0}, "n_heads must be an integer, got float"),
        ({"n_heads": 2, "n_kv_heads": True}, "n_kv_heads must be an integer, got bool"),
        ({"n_heads": 2, "head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"n_heads": 8}, "head_dim must be even"),
        ({"n_heads": 2, "window": (-1, 0)}, "window's left must be at least 0, got -1"),
        ({"n_heads": 2, "window": (1, 0.5)}, "window's right must be an integer, got float"),
        ({"n_heads": 2, "window": (3,)}, "window must be"),
        ({"n_heads": 2, "rope_base": 0.0}, "base must be positive"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Attention(8, **arguments)


def test_a_bidirectional_mixer_says_what_it_has_not():
    with pytest.raises(MissingForm, match=r"Attention\(causal=False\) has no step form"):
        Attention(8, n_heads=2, causal=False).step(torch.randn(1, 8), None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mixer": "attentoin", "n_heads": 2}, "one of attention.*, got 'attentoin'"),
        ({"n_heads": 2}, "got None"),
        ({"mixer": "attention", "heads": 2, "n_heads": 2}, "no argument heads; it knows .*n_heads"),
        ({"mixer": "attention"}, "attention needs n_heads"),
    ],
)
def test_build_mixer_names_what_is_wrong(config, message):
    with pytest.raises(ValueError, match=message):
        build_mixer(8, config)
