"""Small random models of transformers through onchip, against the same models on their own PyTorch functions."""

import inspect
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

from onchip.integrations.transformers import register  # noqa: E402

SMALL = {"vocab_size": 50, "hidden_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
MAMBA2 = {"n_groups": 2, "chunk_size": 8}

MODELS = {
    "mamba": ("Mamba", {**SMALL, "num_hidden_layers": 2, "state_size": 4}),
    "falcon_mamba": ("FalconMamba", {**SMALL, "num_hidden_layers": 2, "state_size": 4}),
    "mamba2": ("Mamba2", {**SMALL, **MAMBA2, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8, "state_size": 4}),
    "jamba": (
        "Jamba",
        {**SMALL, **HEADS, "num_hidden_layers": 4, "mamba_d_state": 4, "mamba_dt_rank": 3, "num_experts": 2}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    ),
    "bamba": (
        "Bamba",
        {**SMALL, **HEADS, "num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 8}
        | {"mamba_n_groups": 2, "mamba_d_state": 4, "mamba_chunk_size": 8},
    ),
    "zamba": (
        "Zamba",
        {**SMALL, **HEADS, "num_hidden_layers": 6, "mamba_d_state": 4, "mamba_dt_rank": 3, "n_mamba_heads": 2}
        | {"attn_layer_period": 3, "attn_layer_offset": 2, "num_key_value_heads": 4},
    ),
    "zamba2": (
        "Zamba2",
        {**SMALL, **HEADS, "num_hidden_layers": 3, "mamba_d_state": 4, "mamba_ngroups": 1, "n_mamba_heads": 4}
        | {"layers_block_type": ["mamba", "hybrid", "mamba"], "num_mem_blocks": 1, "num_key_value_heads": 4}
        | {"chunk_size": 8, "mamba_headdim": 8}
        | {"use_mem_rope": False},
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    register()
    family, config = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**config)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that every term counts
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture
def theirs(name, model, monkeypatch):
    """Runs a function with transformers' own PyTorch functions in the place of onchip's."""

    def run(function):
        module = sys.modules[f"transformers.models.{name}.modeling_{name}"]
        replaced = {key: f for key, f in vars(module).items() if hasattr(f, "through_onchip")}
        assert replaced, "nothing of the model runs through onchip"
        with monkeypatch.context() as patch:
            for key, f in replaced.items():
                patch.setattr(module, key, inspect.unwrap(f))
            return function()

    return run


def agree(got, expected, what=""):
    """Both are in float32, with sums in another order: to within a ten-thousandth of the largest element."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max(), what


def tokens(*shape):
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_logits_and_gradients(model, theirs, padded, training):
    model.train(training)
    ids = tokens(2, 19)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :5] = 0

    def run():
        model.zero_grad()
        logits = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        logits.square().mean().backward()
        return logits.detach(), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    (expected, wanted), (logits, gradients) = theirs(run), run()
    agree(logits, expected)
    assert gradients.keys() == wanted.keys()
    for key, gradient in gradients.items():
        agree(gradient, wanted[key], key)


def test_generation(model, theirs):
    ids = tokens(2, 11)

    def run():
        return model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)

    assert torch.equal(run(), theirs(run))


def test_a_prompt_in_chunks(model):
    ids = tokens(2, 24)
    whole = model(ids, use_cache=False).logits
    known, more, parts = inspect.signature(model.forward).parameters, {}, []
    with torch.no_grad():
        for part, positions in zip(*(x.split([9, 8, 1, 6], dim=-1) for x in (ids, torch.arange(24))), strict=True):
            if "position_ids" in known:
                more["position_ids"] = positions[None]
            result = model(part, use_cache=True, **more)
            cache = "cache_params" if "cache_params" in known else "past_key_values"
            more[cache] = result[cache]
            parts.append(result.logits)
    agree(torch.cat(parts, 1), whole)


def test_compiles_into_one_graph(name, model):
    if name not in ("mamba", "mamba2"):
        pytest.skip("one of each kind of mixer")
    ids = tokens(2, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        agree(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_gradients_through_a_prompt_in_chunks():
    """They stop at the cache, whose states transformers writes in place, and are what they are from there on."""
    register()
    family, config = MODELS["mamba"]
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**config))
    ids = tokens(1, 12)
    with torch.no_grad():
        first = model(ids[:, :7], use_cache=True)
    logits = model(ids[:, 7:], cache_params=first.cache_params).logits
    logits.square().sum().backward()
    head = model.backbone.norm_f.weight.grad
    model.zero_grad()
    model(ids, use_cache=False).logits[:, 7:].square().sum().backward()
    agree(head, model.backbone.norm_f.weight.grad)


def test_packed_sequences_are_kept_apart():
    register()
    _, config = MODELS["mamba2"]
    torch.manual_seed(0)
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**config)).double()
    ids, other = tokens(1, 13), tokens(1, 9)
    together = torch.cat([ids, other], 1)
    seq_idx = torch.tensor([[0] * 13 + [1] * 9], dtype=torch.int32)
    for training in (True, False):
        model.train(training)
        packed = model.backbone(together, seq_idx=seq_idx, use_cache=False)[0]
        alone = torch.cat([model.backbone(x, use_cache=False)[0] for x in (ids, other)], 1)
        torch.testing.assert_close(packed, alone)


@pytest.mark.parametrize("name", ["seq_idx", "cu_seq_lens_q"])
def test_mamba1_says_that_it_cannot_keep_packed_sequences_apart(name):
    register()
    _, config = MODELS["mamba"]
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**config))
    with pytest.raises(ValueError, match=f"{name} must be None: MambaMixer does not reset"):
        model.backbone.layers[0].mixer(torch.randn(1, 9, 16), **{name: torch.zeros(1, 9, dtype=torch.int32)})


def test_a_hybrid_keeps_packed_sequences_apart_in_all_layers_or_says_why_not():
    register()
    _, config = MODELS["bamba"]
    torch.manual_seed(0)
    model = transformers.BambaForCausalLM(transformers.BambaConfig(**config)).double().eval()
    model.set_attn_implementation("onchip")
    ids, other = tokens(1, 5), tokens(1, 4)
    lengths = torch.tensor([0, 5, 9], dtype=torch.int32)
    packed = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 5, "max_length_k": 5}
    packed |= {"position_ids": torch.tensor([[*range(5), *range(4)]]), "use_cache": False}
    together, seq_idx = torch.cat([ids, other], 1), torch.tensor([[0] * 5 + [1] * 4], dtype=torch.int32)
    alone = torch.cat([model(x, use_cache=False).logits for x in (ids, other)], 1)
    torch.testing.assert_close(model(together, seq_idx=seq_idx, **packed).logits, alone)
    with pytest.raises(ValueError, match="seq_idx must be given where cu_seq_lens_q is"):
        model(together, **packed)


def test_registering_again_changes_nothing():
    register()
    from transformers.models.mamba import modeling_mamba as modeling

    before = dict(vars(modeling)), modeling.MambaMixer.forward
    register()
    assert (dict(vars(modeling)), modeling.MambaMixer.forward) == before


def test_models_imported_before_are_served(tmp_path):
    import subprocess

    code = """
import torch, transformers
from transformers.models.mamba import modeling_mamba as modeling
from onchip.integrations.transformers import register
register()
register()
assert modeling.mamba_selective_scan.through_onchip == "selective_scan_fn"
assert modeling.causal_conv1d_fn.through_onchip == "causal_conv1d_fn"
config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)
model = transformers.MambaForCausalLM(config).eval()
ids = torch.randint(50, (1, 20))
with torch.no_grad():
    first = model(ids[:, :8], use_cache=True)
    rest = model(ids[:, 8:], cache_params=first.cache_params).logits
    assert (rest - model(ids).logits[:, 8:]).abs().max() < 1e-4
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
