"""Dropout through the drop-ins: flash-attn's rule for it, PyTorch's seeds, and models of transformers in training."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import onchip
from onchip.integrations import flash_attn
from onchip.integrations.torch import scaled_dot_product_attention, sdpa_through_onchip
from onchip.integrations.transformers import attention as integration

P = 0.17  # flash-attn's own
FEATURES = ({}, {"causal": True}, {"window_size": (40, 17)}, {"softcap": 30.0, "causal": True}, {"alibi": True})


def plain(q, k, v, kept, features, slopes):
    """Attention in q's dtype with a mask of what is kept, and the probabilities before it."""
    tq, tk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = torch.einsum("bihd,bjhd->bhij", q * q.shape[-1] ** -0.5, k)
    if features.get("softcap"):
        s = features["softcap"] * torch.tanh(s / features["softcap"])
    ahead = torch.arange(tk) - torch.arange(tq)[:, None] - (tk - tq)
    if slopes is not None:
        s = s - (slopes[:, :, None, None] * ahead.abs()).to(s.dtype)
    left, right = features.get("window_size", (tk, 0 if features.get("causal") else tk))
    hidden = (ahead < -left) | (ahead > right)
    p = s.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)
    return torch.einsum("bhij,bjhd->bihd", p * kept / (1 - P), v), p


def call_of(features, batch):
    slopes = torch.rand(batch, 6) * 0.3 if features.get("alibi") else None
    return {n: x for n, x in features.items() if n != "alibi"} | {"alibi_slopes": slopes}, slopes


@pytest.mark.parametrize(
    "dim, lengths, features, dtype",
    [
        (32, (113, 113), FEATURES[0], torch.bfloat16),
        (59, (128, 217), FEATURES[1], torch.float16),
        (128, (108, 256), FEATURES[2], torch.bfloat16),
        (64, (127, 512), FEATURES[3], torch.float16),
        (40, (3, 799), FEATURES[4], torch.bfloat16),
    ],
)
def test_flash_attn_keeps_its_rule_and_shows_what_was_dropped(dim, lengths, features, dtype):
    more, slopes = call_of(features, 1)
    tq, tk = lengths
    leaves = [torch.randn(1, t, h, dim).to(dtype).requires_grad_() for t, h in ((tq, 6), (tk, 2), (tk, 2))]
    out, lse, shown = flash_attn.flash_attn_func(*leaves, P, **more, return_attn_probs=True)
    assert shown.shape == (1, 6, *(-(-t // 128) * 128 for t in lengths)) and shown.dtype == dtype
    assert not shown.requires_grad and lse.shape == (1, 6, tq)
    assert (shown[:, :, tq:] == 0).all() and (shown[..., tk:] == 0).all()
    shown = shown[:, :, :tq, :tk]
    kept = ~shown.signbit()
    dropped = (~kept & (shown != 0)).sum() / (shown != 0).sum()
    assert abs(dropped - P) < (0.01 if (shown != 0).sum() > 5e4 else 0.025)

    wide = [x.detach().float().requires_grad_() for x in leaves]
    (exact, p), (low, _) = plain(*wide, kept, features, slopes), plain(*leaves, kept, features, slopes)
    assert (shown.abs() - p).abs().max() <= 2 * torch.finfo(dtype).eps
    weights = torch.randn_like(out)
    results = [
        (y, *torch.autograd.grad(y, x, weights.to(y.dtype))) for y, x in ((out, leaves), (exact, wide), (low, leaves))
    ]
    for which, (got, want, plainly) in enumerate(zip(*results, strict=True)):
        error, allowed = (x.float() - want for x in (got, plainly))
        assert error.abs().max() <= (3 if which else 2) * allowed.abs().max(), f"result {which}"


@pytest.mark.parametrize("features", FEATURES)
def test_all_forms_of_flash_attn_drop_the_same(features):
    more, _ = call_of(features, 2)
    qkv = torch.randn(2, 19, 3, 6, 16)
    q, k, v = qkv.unbind(2)
    cu = torch.tensor([0, 19, 38], dtype=torch.int32)
    more |= {"return_attn_probs": True}
    calls = [
        lambda: flash_attn.flash_attn_func(q, k, v, P, **more),
        lambda: flash_attn.flash_attn_kvpacked_func(q, qkv[:, :, 1:], P, **more),
        lambda: flash_attn.flash_attn_qkvpacked_func(qkv, P, **more),
        lambda: flash_attn.flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, v)), cu, cu, 19, 19, P, **more
        ),
        lambda: flash_attn.flash_attn_varlen_kvpacked_func(
            *(x.flatten(0, 1) for x in (q, qkv[:, :, 1:])), cu, cu, 19, 19, P, **more
        ),
        lambda: flash_attn.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), cu, 19, P, **more),
    ]  # fmt: skip
    results = []
    for call in calls:
        torch.manual_seed(5)
        results.append(call())
    for out, lse, shown in results:
        torch.testing.assert_close(out.view_as(q), results[0][0], rtol=1e-6, atol=1e-6)
        assert lse.numel() == 2 * 6 * 19
        assert torch.equal(shown, results[0][2])
    assert not torch.equal(calls[0]()[2], results[0][2])  # another draw


def test_ragged_sequences_show_what_was_dropped():
    cu_q, cu_k = torch.tensor([0, 5, 5, 12]), torch.tensor([0, 9, 11, 140])
    q, k = torch.randn(12, 2, 8), torch.randn(140, 2, 8)
    out, _, shown = flash_attn.flash_attn_varlen_func(q, k, k, cu_q, cu_k, 7, 129, 0.4, return_attn_probs=True)
    assert shown.shape == (3, 2, 128, 256)
    for b in range(3):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        p = shown[b, :, : rows.stop - rows.start, : keys.stop - keys.start]
        torch.testing.assert_close(out[rows], torch.einsum("hij,jhd->ihd", p.clamp(min=0) / 0.6, k[keys]))
    assert flash_attn.flash_attn_func(q[None], k[None], k[None], return_attn_probs=True)[2].numel() == 0


def drawn_seed():
    return int(torch.randint((1 << 63) - 1, ()))


def test_the_seed_comes_from_pytorchs_generator():
    q, k, v = torch.randn(3, 2, 4, 9, 16).unbind(0)
    torch.manual_seed(3)
    seed = drawn_seed()
    want = onchip.attention(*(x.transpose(1, 2) for x in (q, k, v)), dropout_p=0.5, seed=seed).transpose(1, 2)
    flash = functools.partial(flash_attn.flash_attn_func, *(x.transpose(1, 2) for x in (q, k, v)), dropout_p=0.5)
    for call in (
        lambda: scaled_dot_product_attention(q, k, v, dropout_p=0.5),
        lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5),
        lambda: flash().transpose(1, 2),
    ):
        torch.manual_seed(3)
        with sdpa_through_onchip():
            assert torch.equal(call(), want)


def test_all_is_dropped():
    q = torch.randn(1, 2, 3, 8, requires_grad=True)
    for attend in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        out = attend(q, q, q, dropout_p=1.0)
        assert (out == 0).all()
        assert (torch.autograd.grad(out.sum(), q)[0] == 0).all()


def test_layers_of_pytorch_in_training():
    layer, x = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), torch.randn(2, 40, 16)
    layer.self_attn.dropout = 0.3
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        with sdpa_through_onchip():
            outs.append(layer(x))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    with sdpa_through_onchip():
        torch.testing.assert_close(layer.eval()(x), layer(x), rtol=0, atol=0)


transformers = pytest.importorskip("transformers", reason="runs models of transformers (pip install 'onchip[dev]')")
integration.register()
SIZES = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | {"num_key_value_heads": 2, "attention_dropout": 0.3}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "gemma2": lambda: transformers.Gemma2Config(**LLAMA, head_dim=8, query_pre_attn_scalar=8, sliding_window=5),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **LLAMA, head_dim=8, sliding_window=5, num_local_experts=2, num_experts_per_tok=1
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=31, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.3, resid_pdrop=0.0, embd_pdrop=0.0
    ),
    "bert": lambda: transformers.BertConfig(**SIZES, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.0),
}


def model_of(name):
    config = CONFIGS[name]()
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    kind = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    return kind.from_config(config, attn_implementation="onchip")


def logits_and_gradients(model, x, mask, seed):
    torch.manual_seed(seed)
    model.zero_grad()
    logits = model(input_ids=x, attention_mask=mask).logits * mask[..., None]
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_in_training(name, monkeypatch):
    """The same seed gives what the definition gives with it, in logits and gradients; evaluation drops nothing."""
    model, x, mask = model_of(name).train(), torch.randint(31, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
    mask[1, :4] = 0
    got, other = (logits_and_gradients(model, x, mask, seed) for seed in (0, 1))
    with monkeypatch.context() as patch:
        patch.setattr(integration, "attention", functools.partial(onchip.attention, backend="reference"))
        want = logits_and_gradients(model, x, mask, 0)
    scales = want[0].abs().max(), *[max(grad.abs().max() for grad in want[1:])] * (len(want) - 1)
    for a, b, scale in zip(got, want, scales, strict=True):
        assert (a - b).abs().max() <= 2e-5 * scale
    assert (other[0] - got[0]).abs().max() > 1e-3 * scales[0]
    model.eval()
    assert torch.equal(*(logits_and_gradients(model, x, mask, seed)[0] for seed in (0, 1)))


def test_checkpointed_layers_drop_the_same_again():
    model, x = model_of("llama").train(), torch.randint(31, (2, 12))
    want = logits_and_gradients(model, x, torch.ones_like(x), 0)
    model.activation_checkpointing_enable()
    got = logits_and_gradients(model, x, torch.ones_like(x), 0)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_layer_drops_as_often_as_eager_attention_and_has_its_mean():
    layer = transformers.AttentionInterface()["onchip"]
    q, k = torch.randn(2, 1, 4, 64, 8).unbind(0)
    v = torch.eye(64).expand(1, 4, 64, 64)  # the output is the probabilities
    whole = layer(nn.Module(), q, k, v, None, is_causal=False)[0]
    drawn = torch.stack([layer(nn.Module(), q, k, v, None, dropout=0.3, is_causal=False)[0] for _ in range(50)])
    count = drawn.numel()
    assert abs((drawn == 0).sum() / count - 0.3) < 5 * (0.3 * 0.7 / count) ** 0.5
    assert abs(drawn.sum(-1).mean() - 1) < 5 * (0.3 / 0.7 * (whole**2).sum(-1).mean() / (count / 64)) ** 0.5
    torch.testing.assert_close(drawn[drawn != 0], (whole / 0.7).expand_as(drawn)[drawn != 0], rtol=1e-4, atol=1e-6)
