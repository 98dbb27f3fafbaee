"""Models of transformers give with `attn_implementation="onchip"` what they give with eager attention."""

import copy

import pytest
import torch

from onchip.integrations.transformers import register
from onchip.integrations.transformers.attention import CausalMask

transformers = pytest.importorskip("transformers", reason="runs models of transformers (pip install 'onchip[dev]')")
register()

V = 61
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=5),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    ),
    "bert": lambda: transformers.BertConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=5, attn_logit_softcapping=2.0
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **SIZES, head_dim=8, sliding_window=5, num_local_experts=2, num_experts_per_tok=1
    ),
}
DECODERS = [name for name in CONFIGS if name != "bert"]


def pair(name, **changes):
    """The same random model twice, with eager attention and with onchip's."""
    config = CONFIGS[name]()
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    for field, value in changes.items():
        setattr(config, field, value)
    kind = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    # A copy for each: a model keeps the config that it was made of, and its implementation is written there.
    eager = kind.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in eager.named_parameters():
            parameter.add_((1.0 if "sinks" in key else 0.1) * torch.randn_like(parameter))
    ours = kind.from_config(copy.deepcopy(config), attn_implementation="onchip").eval()
    ours.load_state_dict(eager.state_dict())
    assert [model.config._attn_implementation for model in (eager, ours)] == ["eager", "onchip"]
    return eager, ours


def close(got, expected):
    """Two layers in float32, in another order of summation."""
    assert torch.isfinite(got).all()
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max().clamp(min=1e-2)


def tokens(*shape):
    return torch.randint(V, shape)


def padding(side, T=13):
    """`(2, T)`: the second row is shorter by 4."""
    mask = torch.ones(2, T, dtype=torch.int64)
    if side is not None:
        mask[1, slice(4) if side == "left" else slice(T - 4, T)] = 0
    return mask


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients(name, side):
    x, mask = tokens(2, 13), padding(side)
    weights = torch.randn(2, 13, V) * mask[..., None]
    results = []
    for model in pair(name):
        logits = model(input_ids=x, attention_mask=mask).logits
        (logits * weights).sum().backward()
        results.append((logits[mask.bool()].detach(), {n: p.grad for n, p in model.named_parameters()}))
    (expected, grads), (got, ours) = results
    close(got, expected)
    scale = max(grad.abs().max() for grad in grads.values() if grad is not None)
    for key, grad in grads.items():
        assert (grad is None) == (ours[key] is None), key
        if grad is not None:
            assert (ours[key] - grad).abs().max() <= 2e-5 * scale, key


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_from_prompts_of_different_lengths(name, cache):
    x, mask = tokens(2, 13), padding("left")
    arguments = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    expected, got = (
        model.generate(x, attention_mask=mask, cache_implementation=cache, **arguments) for model in pair(name)
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_prompt_read_in_parts(name, cache):
    x = tokens(2, 17)
    eager, ours = pair(name)
    expected = eager(input_ids=x).logits
    past = (
        transformers.DynamicCache(config=ours.config)
        if cache == "dynamic"
        else transformers.StaticCache(config=ours.config, max_cache_len=24)
    )
    parts = [
        ours(input_ids=part, past_key_values=past, use_cache=True).logits for part in x.split([6, 5, 1, 4, 1], dim=1)
    ]
    close(torch.cat(parts, dim=1), expected)


# gpt-oss makes its masks without regard to the positions: eager attention mixes the sequences even with boundaries.
PACKED = [(name, boundaries) for name in DECODERS for boundaries in (False, True) if name != "gpt-oss" or boundaries]


@pytest.mark.parametrize(("name", "boundaries"), PACKED)
def test_packed_sequences_do_not_see_each_other(name, boundaries, monkeypatch):
    """In logits and gradients, and nothing is made that has a value for every pair of tokens."""
    x, weights = tokens(1, 16), torch.randn(1, 16, V)
    eager, ours = pair(name)
    expected = torch.cat([eager(input_ids=part).logits for part in (x[:, :9], x[:, 9:])], dim=1)
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    kwargs = {"position_ids": positions}
    if boundaries:
        cu = torch.tensor([0, 9, 16], dtype=torch.int32)
        kwargs |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 9, "max_length_k": 9}
    monkeypatch.setattr(transformers.masking_utils, "sdpa_mask", None)
    got = ours(input_ids=x, use_cache=False, **kwargs).logits
    close(got, expected)
    for logits in (got, expected):
        (logits * weights).sum().backward()
    scale = max(p.grad.abs().max() for p in eager.parameters() if p.grad is not None)
    for p, q in zip(ours.parameters(), eager.parameters(), strict=True):
        assert p.grad is q.grad is None or (p.grad - q.grad).abs().max() <= 2e-5 * scale


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_packed_sequences_in_a_batch(name):
    """Every row of the batch has sequences of its own, which may begin at any position."""
    x, positions = tokens(2, 12), torch.stack([torch.arange(12) % 7, 40 + torch.arange(12) % 5])
    eager, ours = pair(name)
    close(*(model(input_ids=x, position_ids=positions, use_cache=False).logits for model in (ours, eager)))
    for row in range(2):  # eager attention keeps the rows' sequences apart, and so this is not true by chance
        begins = (positions[row].diff() != 1).nonzero().flatten().add(1).tolist()
        parts = torch.tensor_split(torch.arange(12), begins)
        alone = [eager(input_ids=x[row : row + 1, p], position_ids=positions[row : row + 1, p]).logits for p in parts]
        close(ours(input_ids=x, position_ids=positions, use_cache=False).logits[row], torch.cat(alone, 1)[0])


def test_a_mask_that_only_looks_packed_is_written_out():
    make, utils = transformers.AttentionMaskInterface()["onchip"], transformers.masking_utils
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    numbers = utils.find_packed_sequence_indices(positions)
    packed = lambda inside: utils.packed_sequence_compatibility_function(inside, positions, numbers)  # noqa: E731
    more = {"allow_is_causal_skip": False, "q_length": 5, "kv_length": 5, "batch_size": 1}
    mask = make(mask_function=packed(utils.causal_mask_function), **more)
    assert type(mask) is CausalMask and mask.boundaries.tolist() == [0, 3, 5] and mask.left is None
    assert mask.to("meta").boundaries.device.type == "meta"
    mask = make(mask_function=packed(utils.sliding_window_causal_mask_function(2)), local_size=2, **more)
    assert type(mask) is CausalMask and mask.left == 1
    written = mask & torch.ones(5, dtype=torch.bool)  # as Falcon does with its mask
    assert written.shape == (1, 1, 5, 5) and written.sum() == 8 and not written[0, 0, 3, 2]
    others = [
        packed(utils.and_masks(utils.causal_mask_function, lambda b, h, i, j: i != 1)),
        packed(utils.and_masks(lambda b, h, i, j: i != 1, utils.causal_mask_function)),
        packed(utils.bidirectional_mask_function),
        utils.or_masks(packed(utils.causal_mask_function), lambda b, h, i, j: i == 4),
        utils.and_masks(packed(utils.causal_mask_function), lambda b, h, i, j: i != 1),
    ]
    for function in others:
        mask = make(mask_function=function, **more, use_vmap=True)
        assert type(mask) is torch.Tensor and mask.shape == (1, 1, 5, 5)


@pytest.mark.parametrize("T", [1, 7])
def test_boundaries_alone_are_enough_for_the_layer(T):
    """Without a mask the sequences are kept apart by their boundaries, in time linear in each."""
    layer = transformers.AttentionInterface()["onchip"]
    module = torch.nn.Module()
    q, k, v = torch.randn(1, 4, 2 * T, 8), torch.randn(1, 2, 2 * T, 8), torch.randn(1, 2, 2 * T, 8)
    cu = torch.tensor([0, T, 2 * T], dtype=torch.int32)
    got, _ = layer(module, q, k, v, None, cu_seq_lens_q=cu, cu_seq_lens_k=cu)
    for part in (slice(0, T), slice(T, 2 * T)):
        alone, _ = layer(module, q[:, :, part], k[:, :, part], v[:, :, part], None)
        torch.testing.assert_close(got[:, part], alone, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="cu_seq_lens_q needs a batch of 1"):
        layer(module, *(x.expand(2, -1, -1, -1) for x in (q, k, v)), None, cu_seq_lens_q=cu, cu_seq_lens_k=cu)


def test_boundaries_and_padding_together_are_refused():
    _, ours = pair("llama")
    x, cu, mask = tokens(1, 13), torch.tensor([0, 5, 13], dtype=torch.int32), torch.ones(1, 13, dtype=torch.int64)
    boundaries = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
    close(
        ours(input_ids=x, attention_mask=mask, use_cache=False, **boundaries).logits,
        ours(input_ids=x, use_cache=False, **boundaries).logits,
    )
    mask[:, 11:] = 0
    with pytest.raises(ValueError, match="cu_seq_lens_q cannot be given together with an attention_mask"):
        ours(input_ids=x, attention_mask=mask, use_cache=False, **boundaries)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_mask_of_the_callers_own(kind):
    x, eager_and_ours = tokens(2, 9), pair("llama")
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    visible[6:, 2] = False
    mask = visible.expand(2, 1, 9, 9)
    added = torch.zeros(2, 1, 9, 9).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = eager_and_ours[0](input_ids=x, attention_mask=added).logits
    close(eager_and_ours[1](input_ids=x, attention_mask=mask if kind == torch.bool else added).logits, expected)


def test_a_decoder_made_bidirectional():
    x = tokens(2, 9)
    eager, ours = pair("llama", is_causal=False)
    for model in (eager, ours):
        for module in model.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False
    expected = eager(input_ids=x).logits
    close(ours(input_ids=x).logits, expected)
    causal = pair("llama")[1]
    causal.load_state_dict(ours.state_dict())
    assert (causal(input_ids=x).logits - expected).abs().max() > 1e-2


def test_is_causal_of_the_call_outranks_the_modules():
    layer, module = transformers.AttentionInterface()["onchip"], torch.nn.Module()
    module.is_causal = True
    q, k, v = torch.randn(3, 1, 2, 6, 8).unbind(0)
    for asked in (None, True, False):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=asked is not False)
        torch.testing.assert_close(layer(module, q, k, v, None, is_causal=asked)[0], expected.transpose(1, 2))


def test_no_mask_of_all_pairs_where_less_says_the_same():
    make = transformers.AttentionMaskInterface()["onchip"]
    config = CONFIGS["mistral"]()
    padded = padding("left").bool()
    assert make(2, 13, 13, attention_mask=torch.ones(2, 13, dtype=torch.bool)) is None
    mask = make(2, 13, 13, attention_mask=padded)
    assert type(mask) is CausalMask and mask.visible.shape == (2, 1, 1, 13) and mask.left is None
    mask = make(2, 13, 13, local_size=5, config=config, mask_function=lambda *_: 1 / 0)
    assert type(mask) is CausalMask and mask.visible is None and mask.left == 4
    mask = make(1, 4, 20, q_offset=8)  # a part of a prompt in a static cache
    assert (mask.end, mask.left, mask.visible) == (12, None, None)
    assert make(1, 1, 20, q_offset=19) is None


@pytest.mark.parametrize(("shown", "T"), [(13, 13), (9, 4)])
def test_padding_of_a_bidirectional_mask_is_one_row(shown, T):
    """Also of a mask that ends early, and of queries that are not the keys."""
    make, function = (
        transformers.AttentionMaskInterface()["onchip"],
        transformers.masking_utils.bidirectional_mask_function,
    )
    more = {"mask_function": function, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
    assert make(2, T, 13, attention_mask=torch.ones(2, 13, dtype=torch.bool), **more) is None
    padded = padding("right").bool()[:, :shown]
    mask = make(2, T, 13, attention_mask=padded, **more)
    expected = transformers.masking_utils.sdpa_mask(2, T, 13, attention_mask=padded, **more)
    assert mask.stride(2) == 0 and mask.dtype == torch.bool
    assert torch.equal(mask, expected)


def test_a_model_that_computes_with_its_mask_is_told():
    mask = transformers.AttentionMaskInterface()["onchip"](2, 13, 13, attention_mask=padding("left").bool())
    assert mask.shape == (2, 1, 1, 13) and mask.dtype == torch.bool and mask.ndim == 4
    moved = mask.to(device="meta")
    assert type(moved) is CausalMask and moved.visible.device.type == "meta" and moved.end == mask.end == 13
    assert mask.contiguous() is mask
    with pytest.raises(ValueError, match="are boolean"):
        mask.to(torch.float32)
    with pytest.raises(ValueError, match="computes with its attention mask"):
        mask[:, :, :, :4]
    with pytest.raises(ValueError, match="computes with its attention mask"):
        mask & mask


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [("position_bias", torch.zeros(1), "sdpa"), ("output_attentions", True, "eager"), ("cache", object(), "sdpa")],
)
def test_what_is_not_there_is_refused_by_name(name, value, instead):
    layer, (q, k, v) = transformers.AttentionInterface()["onchip"], torch.randn(3, 1, 2, 6, 8).unbind(0)
    layer(torch.nn.Module(), q, k, v, None, **{name: None})
    with pytest.raises(ValueError, match=f'has no {name}: attn_implementation="{instead}" has'):
        layer(torch.nn.Module(), q, k, v, None, **{name: value})


def test_a_window_without_a_mask():
    layer, module = transformers.AttentionInterface()["onchip"], torch.nn.Module()
    q, k, v = torch.randn(3, 1, 2, 6, 8).unbind(0)
    i = torch.arange(6)
    mask = (i[:, None] >= i) & (i[:, None] - i < 3)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(layer(module, q, k, v, None, sliding_window=3)[0], expected.transpose(1, 2))
    with pytest.raises(ValueError, match="has no sliding_window without causal attention"):
        layer(module, q, k, v, None, is_causal=False, sliding_window=3)


def test_gradient_checkpointing():
    x, mask = tokens(2, 13), padding("left")
    grads = []
    for model, checkpointed in zip(pair("mistral"), (False, True), strict=True):
        model.train()
        if checkpointed:
            model.activation_checkpointing_enable()
        (model(input_ids=x, attention_mask=mask, use_cache=False).logits * mask[..., None]).sum().backward()
        grads.append(model.model.embed_tokens.weight.grad)
    close(grads[1], grads[0])


def test_compiled():
    x, mask = tokens(2, 13), padding("left")
    eager, ours = pair("mistral", num_hidden_layers=1)
    compiled = torch.compile(ours, backend="eager")
    with torch.no_grad():
        got, expected = (model(input_ids=x, attention_mask=mask).logits[mask.bool()] for model in (compiled, eager))
    close(got, expected)
