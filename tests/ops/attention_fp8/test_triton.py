"""The kernel in Triton: on a GPU that has FP8 where there is one, else interpreted, over the few tokens that allows."""

from importlib import import_module

import pytest
import torch

import onchip
from onchip.ops import _triton
from onchip.ops.attention_fp8.quantize import E4M3

from . import oracle
from .test_definition import expected, inputs

ON_GPU = torch.cuda.is_available()
if _triton.missing is not None:
    pytest.skip(_triton.missing, allow_module_level=True)
if not ON_GPU and not _triton.interpreted_on():
    pytest.skip("there is no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)
if ON_GPU and torch.cuda.get_device_capability() < (8, 9):
    pytest.skip("the GPU has no tensor cores for FP8", allow_module_level=True)

DEVICE = "cuda" if ON_GPU else "cpu"
kernels = import_module("onchip.ops.attention_fp8.triton")
triton, tl = kernels.triton, kernels.tl
rounded = kernels._rounded

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, of masked elements


@triton.jit
def round_all(x, y, N: tl.constexpr, INTERPRETED: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, rounded(tl.load(x + i), y.dtype.element_ty, INTERPRETED))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)


def run(tensors, **options):
    moved = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    results = onchip.attention_fp8_with_lse(*(x.to(DEVICE) for x in tensors), backend="triton", **moved)
    return [x.cpu() for x in results]


def check(got, lse, want, want_lse, slack):
    """As close to the definition as float32 allows; on a GPU, as its tensor cores' sums allow, which have 14 bits."""
    empty = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert (got[empty.T] == 0).all()
    slack = slack.nan_to_num() + (2.0**-10 * want.nan_to_num().abs().max() if ON_GPU and want.numel() else 1e-30)
    assert ((got.double() - want.nan_to_num()).abs() <= slack).all()
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=2e-3 if ON_GPU else 1e-5)


CALLS = {
    "plain": ((130, 300, 1, 1, 32, 32), {}),
    "decoding": ((1, 260, 4, 1, 64, 64), {"causal": True}),
    "causal, grouped": ((140, 140, 4, 2, 16, 24), {"causal": True}),
    "rows that see nothing": ((140, 129, 1, 1, 8, 8), {"causal": True}),
    "window": ((150, 310, 1, 1, 40, 8), {"window": (130, 5)}),
    "softcap": ((20, 260, 1, 1, 16, 16), {"softcap": 1.5, "scale": 0.5}),
    "negative scale": ((10, 140, 1, 1, 16, 16), {"scale": -0.3}),
    "a scale a head, no signs": ((20, 300, 1, 1, 59, 111), {"block_scales": False, "incoherent_": False}),
    "the widest head": ((5, 130, 1, 1, 256, 256), {}),
    "no key": ((5, 0, 2, 2, 8, 8), {}),
    "no query": ((0, 5, 2, 2, 8, 8), {}),
}


@pytest.mark.parametrize("shape, options", CALLS.values(), ids=CALLS)
def test_is_the_formula(shape, options):
    q, k, v = inputs(*shape, batch=(1,))
    out, lse = run((q, k, v), **{n.removesuffix("_"): x for n, x in options.items()})
    assert (out.shape, out.dtype) == ((*q.shape[:3], v.shape[-1]), q.dtype)
    check(out[0], lse[0], *expected(q[0], k[0], v[0], **options, logit_error=2e-3 if ON_GPU else 1e-5))


@pytest.mark.parametrize("causal", [False, True])
def test_packed_is_one_by_one(causal):
    lengths_q, lengths_k = [40, 0, 5, 1], [140, 4, 0, 33]
    q, k, v = inputs(sum(lengths_q), sum(lengths_k), 2, 1, 24, 16, batch=())
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (lengths_q, lengths_k))
    out, lse = run((q, k, v), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=causal)
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    alone = [run([x[None] for x in part], causal=causal) for part in parts]
    assert torch.equal(out, torch.cat([x[0][0] for x in alone]))
    assert torch.equal(lse, torch.cat([x[1][0] for x in alone], 1))


def test_a_neighbour_that_is_not_finite_does_not_show():
    q, k, v = inputs(20, 20, 1, 1, 16, 16, batch=())
    cu = torch.tensor([0, 9, 20])
    before = run((q, k, v), cu_seqlens_q=cu)[0]
    for x in (q, k, v):
        x[9:] = torch.nan
    assert torch.equal(run((q, k, v), cu_seqlens_q=cu)[0][:9], before[:9])


def test_any_strides():
    tensors = inputs(9, 12, 2, 1, 16, 16)
    strided = [x.movedim(-1, 0).contiguous().movedim(0, -1) for x in tensors]
    for incoherent in (True, False):
        for got, want in zip(run(strided, incoherent=incoherent), run(tensors, incoherent=incoherent), strict=True):
            assert torch.equal(got, want)


# Interpreted, bfloat16 is cut off instead of rounded.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16], ids=str)
def test_low_precision_in_and_out(dtype):
    tensors = inputs(9, 12, 1, 1, 16, 16, dtype=dtype)
    out, lse = run(tensors)
    wide, wide_lse = run([x.float() for x in tensors])
    assert torch.equal(out, wide.to(dtype)) and torch.equal(lse, wide_lse)


def test_probabilities_are_rounded_to_nearest_with_ties_to_even():
    middles = (oracle.NUMBERS[1:] + oracle.NUMBERS[:-1]) / 2
    sizes = torch.cat([oracle.NUMBERS, middles, middles * (1 + 1e-6), middles * (1 - 1e-6)]).float()
    x = sizes[sizes <= 256][:384]
    x = torch.nn.functional.pad(x, (0, 512 - x.numel())).to(DEVICE)
    y = torch.empty(512, dtype=E4M3, device=DEVICE)
    round_all[(1,)](x, y, 512, not ON_GPU)
    assert torch.equal(y.cpu().double(), oracle.e4m3(x.cpu()))
