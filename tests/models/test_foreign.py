"""Checkpoints of transformers: the same logits, gradients and tokens, and the same bits after a round trip."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from onchip.models import load_model, save_model

transformers = pytest.importorskip("transformers", reason="compares with transformers (pip install 'onchip[dev]')")

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MAMBA2 = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 16,
    "conv_kernel": 4,
}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama biased, tied": lambda: transformers.LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=16
    ),
    "llama 3": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=1, rope_parameters=LLAMA3),
    "mistral": lambda: transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5),
    "mistral without a window": lambda: transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, num_key_value_heads=2),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=40),
    "gpt2 untied": lambda: transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=24, n_inner=40, tie_word_embeddings=False
    ),
    "mamba": lambda: transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4),
    "mamba biased, untied": lambda: transformers.MambaConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=5,
        conv_kernel=3,
        time_step_rank=7,
        expand=1,
        use_bias=True,
        use_conv_bias=False,
        tie_word_embeddings=False,
    ),
    "mamba2": lambda: transformers.Mamba2Config(**MAMBA2, n_groups=1),
    "mamba2 biased, grouped, tied": lambda: transformers.Mamba2Config(
        **MAMBA2, n_groups=2, use_bias=True, use_conv_bias=False, tie_word_embeddings=True, chunk_size=8
    ),
}


def make(name, dtype=torch.float32):
    """A random model of transformers in `dtype`, with every number drawn, gains and biases too."""
    config = MODELS[name]()
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    if "mamba" not in name:
        config._attn_implementation = "sdpa"  # eager computes its softmax in float32, whatever the model's dtype
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def tokens(*shape):
    return torch.randint(61, shape)


class ExactRotary(torch.nn.Module):
    """Their rotary embedding with angles in float64; transformers computes them in float32."""

    def __init__(self, theirs):
        super().__init__()
        config = theirs.config
        rope = config.rope_parameters
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        frequencies = rope["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        if rope["rope_type"] == "llama3":
            wavelength = 2 * torch.pi / frequencies
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            length = rope["original_max_position_embeddings"]
            smooth = (length / wavelength - low) / (high - low)
            between = (1 - smooth) * frequencies / rope["factor"] + smooth * frequencies
            slow = torch.where(wavelength > length / low, frequencies / rope["factor"], between)
            frequencies = torch.where(wavelength < length / high, frequencies, slow)
        self.frequencies = frequencies

    def forward(self, x, position_ids):
        angles = (position_ids[..., None] * self.frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


class ExactNorm(torch.nn.Module):
    """Their norm in the dtype of its input; transformers computes it in float32."""

    def __init__(self, theirs):
        super().__init__()
        self.weight, self.eps = theirs.weight, theirs.variance_epsilon

    def forward(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def exact(theirs):
    """`theirs` in float64 throughout."""
    for parent in list(theirs.modules()):
        for child, module in list(parent.named_children()):
            kind = type(module).__name__
            if kind.endswith("RMSNorm"):
                setattr(parent, child, ExactNorm(module))
            elif kind.endswith("RotaryEmbedding"):
                setattr(parent, child, ExactRotary(module))
    return theirs


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_logits_and_gradients_are_those_of_transformers(tmp_path, name, dtype, bound):
    if "mamba" in name and dtype == torch.float64:
        pytest.skip("transformers runs Mamba's recurrence in float32, whatever the model's dtype")
    theirs = make(name, dtype)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    if dtype == torch.float64:
        theirs = exact(theirs)
    x = tokens(2, 19)
    expected, got = theirs(input_ids=x).logits, ours(x)
    assert got.dtype == expected.dtype == dtype
    assert (got - expected).abs().max() <= bound * expected.abs().max()

    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    # In transformers' layout, so that every gradient is compared with its own.
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad)
    save_model(ours, tmp_path / "gradients", like=tmp_path)
    gradients = load_file(tmp_path / "gradients" / "model.safetensors")
    for key, parameter in theirs.named_parameters():
        want = parameter.grad
        assert (gradients.pop(key) - want).abs().max() <= bound * want.abs().max().clamp(min=1e-3), key
    assert not gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_changes_no_bit(tmp_path, name, dtype):
    make(name, dtype).save_pretrained(tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours", like=tmp_path / "theirs")
    before, after = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert all(torch.equal(before[key], value) for key, value in again.state_dict().items() if key in before)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_decoding_takes_the_same_tokens(tmp_path, name):
    theirs = make(name)
    theirs.save_pretrained(tmp_path)
    ours, x = load_model(tmp_path), tokens(2, 6)
    expected = theirs.generate(x, max_new_tokens=14, do_sample=False, pad_token_id=0)
    logits, state = ours.prefill(x, ours.initial_state(2))
    taken = x
    with torch.no_grad():
        for _ in range(14):
            token = logits.argmax(dim=-1)
            taken = torch.cat([taken, token[:, None]], dim=1)
            logits, state = ours.step(token, state)
    assert torch.equal(taken, expected)


def test_states_of_rows_of_different_lengths(tmp_path, name):
    make(name, torch.float64).save_pretrained(tmp_path)
    ours, rows = load_model(tmp_path), [tokens(1, n) for n in (3, 9, 5)]
    state = type(ours.initial_state(1)).stack([ours.prefill(row, ours.initial_state(1))[1] for row in rows])
    order, token = torch.tensor([2, 0, 1, 0]), tokens(4)
    got, after = ours.step(token, state.reorder(order))
    for i, row in enumerate(order.tolist()):
        alone = ours(torch.cat([rows[row], token[None, i : i + 1]], dim=1))[0, -1]
        torch.testing.assert_close(got[i], alone, rtol=1e-10, atol=1e-10)
    assert after.detach().nbytes == after.nbytes


def test_packed_sequences_are_read_one_by_one(tmp_path, name):
    make(name, torch.float64).save_pretrained(tmp_path)
    ours, x = load_model(tmp_path), tokens(12)
    got = ours(x, cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32))
    alone = torch.cat([ours(x[None, :5])[0], ours(x[None, 5:])[0]])
    torch.testing.assert_close(got, alone, rtol=1e-10, atol=1e-10)


def test_shards_are_read_together(tmp_path):
    theirs = make("llama")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    x = tokens(1, 7)
    torch.testing.assert_close(load_model(tmp_path)(x), theirs(input_ids=x).logits, rtol=1e-5, atol=1e-5)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path)


def test_an_index_that_leads_elsewhere_is_refused(tmp_path):
    make("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../x.safetensors"}}')
    with pytest.raises(ValueError, match=r"names '\.\./x\.safetensors', which is no file beside it"):
        load_model(tmp_path)


def test_the_checkpoint_of_gpt2_itself_has_no_prefix_and_holds_masks(tmp_path):
    theirs = make("gpt2")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 40, 40)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, path)
    x = tokens(1, 7)
    torch.testing.assert_close(load_model(tmp_path)(x), theirs(input_ids=x).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("wide", [True, False])
def test_a_residual_stream_in_float32_is_kept(tmp_path, kind, wide):
    """In bfloat16 the error is no larger than theirs, of which rounding the stream would be a large part."""
    config = MODELS[kind]()
    config.num_hidden_layers, config.residual_in_fp32 = 6, wide
    theirs = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    theirs.save_pretrained(tmp_path)
    ours, x = load_model(tmp_path), tokens(4, 30)
    assert ours._embed(x, None).dtype == (torch.float32 if wide else torch.bfloat16)
    with torch.no_grad():
        got, expected, exact = ours(x), theirs(input_ids=x).logits, ours.double()(x)
    assert got.dtype == torch.bfloat16
    ulp = torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (got - exact).square().mean().sqrt() <= 2 * (expected - exact).square().mean().sqrt() + ulp


@pytest.mark.parametrize(("limits", "ours"), [((0.02, 0.5), [0.02, 0.5]), ((0.02, float("inf")), [0.02, None])])
def test_limits_of_the_step_of_time(tmp_path, limits, ours):
    config = transformers.Mamba2Config(**MAMBA2, n_groups=1, time_step_limit=limits)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(tmp_path)
    model, x = load_model(tmp_path), tokens(1, 20)
    assert model.config.layers[0]["dt_limit"] == ours
    torch.testing.assert_close(model(x), theirs(input_ids=x).logits, rtol=1e-4, atol=1e-5)


def test_older_mamba_files_name_the_embedding_otherwise(tmp_path):
    theirs = make("mamba")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name.replace("embeddings", "embedding"): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    x = tokens(1, 7)
    torch.testing.assert_close(load_model(tmp_path)(x), theirs(input_ids=x).logits, rtol=1e-5, atol=1e-5)


def test_every_problem_with_a_mambas_tensors_is_listed_in_their_names(tmp_path):
    make("mamba2").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["backbone.layers.1.mixer.A_log"]
    tensors["backbone.layers.0.mixer.conv1d.weight"] = torch.zeros(96, 1, 3)
    tensors["backbone.layers.0.mixer.in_proj.bias"] = torch.zeros(1)
    tensors["backbone.layers.0.mixer.D"] = tensors["backbone.layers.0.mixer.D"].long()
    save_file(tensors, path)
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    message = str(error.value)
    assert "backbone.layers.0.mixer.conv1d.weight has shape (96, 1, 3) instead of (96, 1, 4)" in message
    assert "backbone.layers.0.mixer.D has dtype int64 instead of a floating one" in message
    assert "missing: backbone.layers.1.mixer.A_log" in message
    assert "unexpected: backbone.layers.0.mixer.in_proj.bias" in message


def test_every_problem_with_the_tensors_is_listed_in_their_names(tmp_path):
    make("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 32)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(1)
    save_file(tensors, path)
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    message = str(error.value)
    assert "model.layers.0.self_attn.q_proj.weight has shape (3, 32) instead of (32, 32)" in message
    assert "missing: model.layers.1.self_attn.k_proj.weight" in message
    assert "unexpected: model.layers.2.mlp.up_proj.weight" in message


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama", "model_type", "bert"),
        ("llama", "hidden_act", "gelu"),
        ("llama", "quantization_config", {"bits": 4}),
        ("llama", "num_hidden_layers", None),
        ("llama", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("llama", "rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}),
        ("llama", "attention_bias", "yes"),
        ("llama", "num_key_value_heads", 3),
        ("llama", "rms_norm_eps", -1.0),
        ("qwen2", "use_sliding_window", True),
        ("gpt2", "activation_function", "relu"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("mamba", "hidden_act", "gelu"),
        ("mamba", "time_step_rank", 0),
        ("mamba", "residual_in_fp32", "no"),
        ("mamba2", "num_heads", 7),
        ("mamba2", "n_groups", 3),
        ("mamba2", "time_step_limit", 0.1),
        ("mamba2", "time_step_limit", ["a", "b"]),
    ],
)
def test_what_the_model_has_not_is_refused_by_name(tmp_path, name, field, value):
    make(name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    word = {"rope_parameters": "rope_type", "num_key_value_heads": "n_kv_heads"}.get(field, field)
    with pytest.raises(ValueError, match=word):
        load_model(tmp_path)


def test_older_files_say_rope_theta_and_rope_scaling(tmp_path):
    theirs = make("llama 3")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    scaling = values.pop("rope_parameters")
    values |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    path.write_text(json.dumps(values))
    x = tokens(1, 30)
    torch.testing.assert_close(load_model(tmp_path)(x), theirs(input_ids=x).logits, rtol=1e-5, atol=1e-5)


def test_no_more_tokens_than_learned_positions(tmp_path):
    make("gpt2 untied").save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    with pytest.raises(ValueError, match="tokens must be at most 24, as many as the model has positions, got 25"):
        ours(tokens(1, 25))
    _, state = ours(tokens(1, 24), ours.initial_state(1))
    with pytest.raises(ValueError, match="got 25"):
        ours.step(tokens(1), state)


def test_like_must_describe_the_model(tmp_path):
    make("llama").save_pretrained(tmp_path / "llama")
    make("gpt2").save_pretrained(tmp_path / "gpt2")
    model = load_model(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"the model must be of the config in like = .*differs in .*layers"):
        save_model(model, tmp_path / "out", like=tmp_path / "gpt2")
    save_model(model, tmp_path / "own")
    with pytest.raises(ValueError, match="onchip's own"):
        save_model(model, tmp_path / "out", like=tmp_path / "own")
    assert not (tmp_path / "out").exists()
