"""Mixers, language models and transformers' Mamba on a GPU give what they give on a CPU."""

import copy

import pytest
import torch

from onchip.generation import generate
from onchip.models import LanguageModel, ModelConfig
from onchip.nn.mixers import MIXERS, build_mixer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
GPU = torch.device("cuda")

ARGUMENTS = {"attention": {"n_heads": 2}, "mamba2": {"head_dim": 8}}
LAYERS = [{"mixer": name, **ARGUMENTS.get(name, {})} for name in ("mamba", "attention", "mamba2", "s4d")]


def busy(module):
    """Every parameter off its first value, so that none is out of sight by being zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def assert_as_good_as_a_cpu(results, module, *inputs):
    """The error is at most twice a CPU's in the same dtype, and a few roundings for each of the sums on the way."""
    exact = results(copy.deepcopy(module).double(), *(x.double() if x.is_floating_point() else x for x in inputs))
    on_cpu = results(module, *inputs)
    on_gpu = results(copy.deepcopy(module).to(GPU), *(x.to(GPU) for x in inputs))
    for name, want in exact.items():
        assert on_gpu[name].device.type == GPU.type
        ours, theirs = ((got[name].cpu().double() - want).abs().max().item() for got in (on_gpu, on_cpu))
        rounding = torch.finfo(on_cpu[name].dtype).eps * want.abs().max().item()
        assert ours <= 2 * theirs + 32 * rounding, f"{name} is off by {ours:.1e}, a CPU's by {theirs:.1e}"


def forms(mixer, x, weights):
    """The output of the parallel form, packed, in chunks and in steps, and the gradients."""
    boundaries = torch.tensor([0, 30, x.shape[1]], dtype=torch.int32, device=x.device)
    y = mixer(x)
    gradients = torch.autograd.grad((y * weights).sum(), list(mixer.parameters()))
    found = {"out": y, "packed": mixer(x[0], cu_seqlens=boundaries)}
    with torch.no_grad():
        head, state = mixer(x[:, :50], mixer.initial_state(len(x)).expendable())
        tail = []
        for x_t in x[:, 50:].unbind(1):
            y_t, state = mixer.step(x_t, state)
            tail.append(y_t)
    found["chunk and steps"] = torch.cat([head, torch.stack(tail, 1)], 1)
    return found | {name: g for (name, _), g in zip(mixer.named_parameters(), gradients, strict=True)}


@pytest.mark.parametrize("name", MIXERS)
def test_every_form_of_every_mixer(name):
    mixer = busy(build_mixer(16, {"mixer": name, **ARGUMENTS.get(name, {})}))
    assert_as_good_as_a_cpu(forms, mixer, torch.randn(2, 70, 16), torch.randn(2, 70, 16))


def test_a_language_model():
    model = busy(LanguageModel(ModelConfig(vocab_size=257, d_model=16, layers=LAYERS, d_mlp=24)))
    assert_as_good_as_a_cpu(lambda model, tokens: {"logits": model(tokens)}, model, torch.randint(257, (2, 40)))
    of = [
        [
            completion.text
            for completion in generate(where, ["ab", "", "a longer one"], max_new_tokens=12, temperature=0)
        ]
        for where in (model, copy.deepcopy(model).to(GPU))
    ]
    assert of[0] == of[1]


@pytest.mark.parametrize("family", ["Mamba", "Mamba2"])
def test_models_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    from onchip.integrations.transformers import register

    register()
    heads = {"num_heads": 4, "head_dim": 8, "n_groups": 2} if family == "Mamba2" else {}
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**shape, **heads)
    model = busy(getattr(transformers, f"{family}ForCausalLM")(config)).eval()
    tokens = torch.randint(3, 50, (2, 20))
    assert_as_good_as_a_cpu(lambda model, tokens: {"logits": model(tokens).logits}, model, tokens)
    new = {"max_new_tokens": 8, "do_sample": False}
    on_gpu = copy.deepcopy(model).to(GPU).generate(tokens.to(GPU), **new)
    assert torch.equal(on_gpu.cpu(), model.generate(tokens, **new))
