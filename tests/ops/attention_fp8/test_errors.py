"""What is refused, and the sentence that says so."""

import pytest
import torch

import onchip
from onchip.ops import _triton

Q, K = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8)
PACKED = {"q": torch.randn(5, 4, 8), "k": torch.randn(7, 2, 8), "v": torch.randn(7, 2, 8)}
STARTS = {"cu_seqlens_q": torch.tensor([0, 5]), "cu_seqlens_k": torch.tensor([0, 7])}

WRONG = {
    "float64": ({"q": Q.double(), "k": K.double(), "v": K.double()}, TypeError, ["q must be float32", "float64"]),
    "e4m3": ({n: x.to(torch.float8_e4m3fn) for n, x in zip("qkv", (Q, K, K), strict=True)}, TypeError, ["q must be"]),
    "head dims": ({"k": torch.randn(2, 7, 2, 9)}, ValueError, ["k must have q's head dim 8"]),
    "window": ({"window": (-1, 0)}, ValueError, ["window's left"]),
    "softcap": ({"softcap": -1.0}, ValueError, ["softcap must be"]),
    "scale": ({"scale": float("inf")}, ValueError, ["scale must be finite"]),
    "block_scales": ({"block_scales": 1}, TypeError, ["block_scales must be True or False, got 1"]),
    "incoherent": ({"incoherent": None}, TypeError, ["incoherent must be True or False, got None"]),
    "seed of no integer": ({"seed": 1.5}, TypeError, ["seed must be an integer, got 1.5"]),
    "seed below zero": ({"seed": -1}, ValueError, ["seed must be from 0", "-1"]),
    "boundaries short": (PACKED | STARTS | {"cu_seqlens_k": torch.tensor([0, 6])}, ValueError, ["cu_seqlens_k", "6"]),
    "unknown backend": ({"backend": "cpu"}, ValueError, ["'triton', 'reference'", "'cpu'"]),
}


@pytest.mark.parametrize("changed, kind, words", WRONG.values(), ids=WRONG)
def test_refused(changed, kind, words):
    with pytest.raises(kind) as error:
        onchip.attention_fp8(**({"q": Q, "k": K, "v": K} | changed))
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", "qkv")
def test_a_gradient_is_refused(name):
    arguments = {"q": Q.clone(), "k": K.clone(), "v": K.clone()}
    arguments[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"inference.*gradient with respect to {name}.*onchip.attention has"):
        onchip.attention_fp8(**arguments)
    with torch.no_grad():
        assert not onchip.attention_fp8(**arguments).requires_grad
    with torch.inference_mode():
        onchip.attention_fp8(**arguments)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # in PyTorch's own decompositions
@pytest.mark.parametrize("transform", ["grad", "jvp", "vjp"])
def test_a_gradient_of_torch_func_is_refused(transform):
    def loss(q):
        out = onchip.attention_fp8(q, K, K)
        return out if transform == "jvp" else out.sum()

    with pytest.raises(RuntimeError, match=r"onchip\.attention has gradients"):
        if transform == "jvp":
            torch.func.jvp(loss, (Q,), (Q,))
        else:
            getattr(torch.func, transform)(loss, *(() if transform == "grad" else (Q,)))(Q)


def test_a_gradient_is_refused_where_it_is_compiled():
    with pytest.raises(Exception, match=r"onchip\.attention has gradients"):
        torch.compile(onchip.attention_fp8, fullgraph=True, backend="aot_eager")(Q.clone().requires_grad_(), K, K)
    torch._dynamo.reset()


@pytest.fixture
def gpu(monkeypatch):
    """Makes believe that there is a GPU of this name and capability, and gives tensors that say they are on it."""

    def pretend(name, capability, hip=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(_triton, "missing", None)
        with torch._subclasses.fake_tensor.FakeTensorMode():
            return torch.empty(1, 4, 2, 8, device="cuda")

    return pretend


def reason(q):
    return onchip.explain(onchip.attention_fp8, q, q, q).candidates[0].refusal


@pytest.mark.parametrize("capability, words", [((8, 0), "8.9 or newer"), ((7, 5), "7.5"), ((8, 6), "onchip.attention")])
def test_a_gpu_without_fp8_is_named(gpu, capability, words):
    refusal = reason(gpu("A-GPU", capability))
    assert "tensor cores for FP8" in refusal and "A-GPU" in refusal and words in refusal


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0)])
def test_a_gpu_with_fp8_serves(gpu, capability):
    assert reason(gpu("A-GPU", capability)) is None


def test_amd_is_refused(gpu):
    assert "NVIDIA's e4m3" in reason(gpu("MI300X", (9, 4), hip="6.4"))


def test_head_dims_beyond_the_kernel_are_named(gpu):
    q = gpu("A-GPU", (9, 0))
    wide = q.new_empty(1, 4, 2, 257)
    assert "head dims go to 256, got 257" in reason(wide)
