"""What the steps of decoding have in common: the short way serves plain tensors, and the long one all others alike."""

import pytest
import torch

import onchip

B, D, N, H, P, W = 2, 8, 4, 2, 4, 3


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


STEPS = {
    "causal_conv1d": (onchip.causal_conv1d_step, (normal(B, D), normal(B, W - 1, D), normal(D, W), normal(D))),
    "selective_scan": (
        onchip.selective_scan_step,
        (normal(B, D), normal(B, D, N), normal(B, D).abs(), -normal(D, N).abs(), normal(B, 1, N), normal(B, 1, N)),
    ),
    "ssd": (
        onchip.ssd_step,
        (normal(B, H, P), normal(B, H, P, N), normal(B, H).abs(), -normal(H).abs(), normal(B, 1, N), normal(B, 1, N)),
    ),
}


@pytest.fixture(params=STEPS)
def step(request):
    return STEPS[request.param]


def test_meta_tensors_get_the_real_shapes(step):
    function, arguments = step
    for real, meta in zip(function(*arguments), function(*(x.to("meta") for x in arguments)), strict=True):
        assert meta.is_meta
        assert (meta.shape, meta.dtype) == (real.shape, real.dtype)


def test_views_that_are_still_to_be_negated(step):
    function, arguments = step
    negated = [torch._neg_view(-x) for x in arguments]
    assert all(x.is_neg() for x in negated)
    for want, got in zip(function(*arguments), function(*negated), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_gradient_and_a_state_in_its_place_exclude_each_other(step, backend):
    function, arguments = step
    for wanted in range(len(arguments)):
        leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(arguments)]
        for place in (leaves[1], leaves[1].detach().clone()):
            before = place.detach().clone()
            with pytest.raises(ValueError, match="out_state must be None where a gradient is asked for"):
                function(*leaves, out_state=place, backend=backend)
            assert torch.equal(place, before)
            with torch.no_grad():
                assert function(*leaves, out_state=place, backend=backend)[1] is place


@pytest.mark.parametrize("backend", [None, "reference"])
def test_an_expanded_state_is_no_place_for_a_new_one(step, backend):
    function, arguments = step[0], list(step[1])
    arguments[1] = arguments[1][:1].expand_as(arguments[1])
    new = function(*arguments, backend=backend)[1]
    assert not torch.equal(new[0], new[1])
    with pytest.raises(
        ValueError, match="out_state must have memory for each of its entries, got one that is expanded"
    ):
        function(*arguments, out_state=arguments[1], backend=backend)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("rows", [(slice(0, 2), slice(1, 3)), (slice(1, 3), slice(0, 2))], ids=["ahead", "behind"])
def test_a_state_may_move_within_its_memory(step, backend, rows):
    function, arguments = step[0], list(step[1])
    source, target = rows
    pool = torch.randn(3, *arguments[1].shape[1:], dtype=arguments[1].dtype)
    arguments[1] = pool[source].clone()
    want, want_state = function(*arguments, backend=backend)
    arguments[1] = pool[source]
    got, state = function(*arguments, out_state=pool[target], backend=backend)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(state, want_state)


def test_a_parameter_in_training_keeps_its_gradient(step):
    function, arguments = step
    leaves = [x.clone().requires_grad_() for x in arguments]
    sum(x.sum() for x in function(*leaves)).backward()
    assert all(x.grad is not None and x.grad.any() for x in leaves)
