"""FP8 attention among PyTorch's own: the dispatcher, tracing; and which implementation serves."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import onchip

Q, K, V = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 6)
STARTS = {"cu_seqlens_q": torch.tensor([0, 2, 10]), "cu_seqlens_k": torch.tensor([0, 8, 14])}
CALLS = {
    "plain": ((Q, K, V), {}),
    "options": ((Q, K, V), {"causal": True, "softcap": 2.0, "block_scales": False, "incoherent": False}),
    "packed": ((Q.flatten(0, 1), K.flatten(0, 1), V.flatten(0, 1)), STARTS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("starts", [(None, None), tuple(STARTS.values())], ids=["dense", "packed"])
def test_opcheck(starts, dtype):
    q, k, v = (x.to(dtype) if starts[0] is None else x.to(dtype).flatten(0, 1) for x in (Q, K, V))
    for seed in (None, 3):
        arguments = (q, k, v, -1, 0, 0.3, 0.0, *starts, True, seed, "reference")
        torch.library.opcheck(torch.ops.onchip.attention_fp8.default, arguments)


@pytest.mark.parametrize("tensors, options", CALLS.values(), ids=CALLS)
def test_compiled_is_the_same(tensors, options):
    torch._dynamo.reset()
    compiled = torch.compile(onchip.attention_fp8_with_lse, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        compiled(*tensors, **options), onchip.attention_fp8_with_lse(*tensors, **options), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("tensors, options", CALLS.values(), ids=CALLS)
def test_fake_and_meta_tensors_get_the_real_shapes(tensors, options):
    mode = FakeTensorMode()
    real = onchip.attention_fp8_with_lse(*tensors, **options)
    with mode:
        fakes = {n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
        fake = onchip.attention_fp8_with_lse(*map(mode.from_tensor, tensors), **fakes)
    metas = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    meta = onchip.attention_fp8_with_lse(*(x.to("meta") for x in tensors), **metas)
    for a, b, c in zip(real, fake, meta, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype) == (c.shape, c.stride(), c.dtype)


def test_on_a_cpu_the_reference_serves_without_a_warning():
    explained = onchip.explain(onchip.attention_fp8, Q, K, V)
    assert explained.chosen == "reference"
    assert onchip.attention_fp8(Q, K, V).shape == (2, 5, 4, 6)
