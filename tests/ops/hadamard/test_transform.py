"""Every implementation of the Hadamard transform against its matrix."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import onchip
from onchip.ops import _native, _select

from .conftest import ALL

F64 = torch.float64


@functools.cache
def matrix(n: int) -> Tensor:
    """H[i, j] = (-1)^popcount(i & j), (n, n) in float64."""
    i = torch.arange(n)
    common = i[:, None] & i
    odd = torch.zeros_like(common)
    for bit in range(n.bit_length()):
        odd ^= common >> bit & 1
    return (1 - 2 * odd).double()


def eager(x: Tensor, signs: Tensor | None, scale: float) -> Tensor:
    """The transform as one writes it in PyTorch, in x's dtype."""
    signed = x if signs is None else x * signs.to(x.dtype)
    return signed @ (scale * matrix(x.shape[-1])).to(x.dtype)


def assert_twice_eager(got: Tensor, x: Tensor, signs: Tensor | None, scale: float) -> None:
    """An error of at most twice that of eager PyTorch, plus a rounding to x's dtype and four of the arithmetic's.

    In float64 eager PyTorch is the measure itself, and is as far from the truth as the transform: twice is meant there.
    """
    wide = x.to(F64) if signs is None else x.to(F64) * signs.to(F64)
    want, terms = wide @ (scale * matrix(x.shape[-1])), abs(scale) * wide.abs().sum(-1, keepdim=True)
    error, eagers = (got.to(F64) - want).abs(), (eager(x, signs, scale).to(F64) - want).abs()
    arithmetic = F64 if x.dtype == F64 else torch.float32
    slack = torch.finfo(x.dtype).eps * want.abs() + 4 * torch.finfo(arithmetic).eps * terms
    excess = (error - 2 * eagers.max() - slack).max() if x.numel() else torch.tensor(0.0)
    assert excess <= 0, f"error {error.max():.3e}, eager's {eagers.max():.3e}, {excess:.3e} too much"


@pytest.mark.parametrize("n", [2**k for k in range(12)])
def test_sizes(target, n):
    for dtype in target.dtypes:
        x, signs = torch.randn(5, n).to(dtype), torch.randint(2, (n,)) * 2 - 1
        assert_twice_eager(target(x), x, None, n**-0.5)
        assert_twice_eager(target(x, signs, scale=0.3), x, signs, 0.3)


def test_the_largest_size(target):
    n = target.max_size
    x = torch.randn(3, n)
    signs = torch.randint(2, (n,)) * 2 - 1
    y = target(x, signs)
    columns = torch.tensor([0, 1, 5, n // 2, n - 1])
    odd = sum((torch.arange(n)[:, None] & columns) >> bit & 1 for bit in range(n.bit_length())) % 2
    want = (x * signs).double() @ (1 - 2 * odd).double() * n**-0.5
    eps = torch.finfo(torch.float32).eps
    assert (y[:, columns] - want).abs().max() <= (2 + n.bit_length()) * eps * x.abs().sum(-1).max() * n**-0.5
    assert torch.allclose(y.square().sum(-1), x.square().sum(-1))


def test_the_matrix_is_scipys():
    scipy = pytest.importorskip("scipy.linalg")
    for n in (1, 2, 64):
        rows = onchip.hadamard(torch.eye(n, dtype=F64), scale=1.0)
        assert torch.equal(rows, torch.from_numpy(scipy.hadamard(n, dtype=float)))
        assert torch.equal(rows, matrix(n))


def test_twice_is_n_times_the_identity(target):
    for n in (1, 2, 8, 64, 512):
        x = torch.randint(-99, 99, (3, n)).float()  # sums of integers are exact
        once = target(x, scale=1.0)
        assert torch.equal(target(once, scale=1.0), n * x)


def test_products_are_kept_and_outliers_spread(target):
    x, y = torch.randn(2, 7, 256)
    x[:, 3] = 500.0
    signs = torch.randint(2, (256,)) * 2 - 1
    a, b = (target(v, signs) for v in (x, y))
    torch.testing.assert_close((a * b).sum(-1), (x * y).sum(-1), rtol=1e-4, atol=1e-2)
    assert a.abs().max() < 500 / 256**0.5 + 6


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "last dimension outermost": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "leading dimensions turned": lambda x: x.flip(0).transpose(0, -2).contiguous().transpose(0, -2),
    "every other": lambda x: inside(x, lambda n: 2 * n, slice(None, None, 2)),
    "inside a larger tensor": lambda x: inside(x, lambda n: n + 3, slice(1, -2)),
    "one row for all": lambda x: x[..., :1, :].expand(x.shape),
    "one element for all": lambda x: x[..., :1].expand(x.shape),
}


def inside(x: Tensor, larger, part: slice) -> Tensor:
    """`x` as a part of a tensor that is NaN elsewhere."""
    storage = torch.full([larger(n) for n in x.shape], torch.nan, dtype=x.dtype)
    return storage[(part,) * x.ndim].copy_(x)


SHAPES = [(1, 16), (3, 8), (2, 3, 4), (2, 3, 2, 32), (2, 1, 3, 2, 8), (3, 2, 2, 1, 5, 2)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strides(target, shape, layout):
    x = LAYOUTS[layout](torch.randn(shape).to(target.dtypes[-1]))
    signs = torch.randn(2 * shape[-1])[::2]
    y = target(x, signs)
    assert y.is_contiguous() and y.dtype == x.dtype and y.shape == x.shape
    assert torch.equal(y, target(x.contiguous(), signs.contiguous()))
    assert_twice_eager(y, x, signs, shape[-1] ** -0.5)


@given(data=st.data())
@settings(max_examples=30)
def test_any_rows(target, data):
    rows = data.draw(st.integers(0, 300))
    n = 2 ** data.draw(st.integers(0, 7))
    dtype = data.draw(st.sampled_from(target.dtypes))
    x = torch.randn(rows, n).to(dtype)
    assert_twice_eager(target(x), x, None, n**-0.5)


def test_a_single_row(target):
    x = torch.randn(16)
    assert torch.equal(target(x), target(x[None])[0])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (0, 3, 2, 4, 8)], ids=str)
def test_an_empty_batch(target, shape):
    assert target(torch.ones(shape), torch.ones(8)).shape == shape


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, F64, torch.bfloat16], ids=str)
def test_signs_of_any_dtype(target, dtype):
    signs = torch.randint(0, 9, (16,))
    x = torch.randn(3, 16)
    want = target(x, signs.float())
    assert torch.equal(target(x, signs.to(dtype)), want)


def test_one_rounding_with_signs_of_any_size(target):
    for dtype in target.dtypes:
        x, signs = torch.randn(9, 64).to(dtype), torch.randn(64)
        wide = onchip.hadamard(x.to(F64), signs.to(F64), backend="reference")
        y = target(x, signs).to(F64)
        arithmetic = 8 * torch.finfo(F64 if dtype == F64 else torch.float32).eps * 64
        assert ((y - wide).abs() <= torch.finfo(dtype).eps / 2 * wide.abs() + arithmetic).all()


def test_gradients_are_rounded_once(target):
    for dtype in target.dtypes:
        x, signs, weights = torch.randn(50, 16).to(dtype), torch.randn(16), torch.randn(50, 16).to(dtype)
        leaves = [t.clone().requires_grad_() for t in (x, signs)]
        exact = [t.clone().to(F64).requires_grad_() for t in (x, signs)]
        got = torch.autograd.grad(target(*leaves), leaves, weights)
        want = torch.autograd.grad(onchip.hadamard(*exact, backend="reference"), exact, weights.to(F64))
        assert got[0].dtype == dtype and got[1].dtype == torch.float32
        terms = signs.abs() * weights.abs().sum(-1, keepdim=True) / 4
        allowed = torch.finfo(dtype).eps / 2 * want[0].abs() + 8 * torch.finfo(torch.float32).eps * terms
        assert ((got[0] - want[0]).abs() <= allowed).all()
        terms = (x.abs() * weights.abs().sum(-1, keepdim=True)).sum(0) / 4
        assert ((got[1] - want[1]).abs() <= 8 * torch.finfo(torch.float32).eps * terms).all()


@pytest.mark.parametrize("n", [1, 2, 16, 128])
def test_nan_stays_in_its_row(target, n):
    x = torch.randn(40, n)
    x[17, n - 1] = torch.nan
    y = target(x)
    assert torch.equal(y.isnan().any(-1), y.isnan().all(-1))
    assert y.isnan().any(-1).nonzero().flatten().tolist() == [17]


def test_a_lazily_negated_view_is_read_with_its_sign(target):
    x = torch.view_as_complex(torch.randn(3, 8, 2)).conj().imag
    assert x.is_neg()
    want = target(x.resolve_neg())
    assert torch.equal(target(x), want)


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
def test_threads_and_grouping_change_no_bits():
    for dtype in ALL:
        x = torch.randn(4096, 64).to(dtype)
        want = torch.cat([onchip.hadamard(rows, backend="cpu") for rows in x.split(37)])
        for threads in (1, 3):
            torch.set_num_threads(threads)
            try:
                assert torch.equal(onchip.hadamard(x, backend="cpu"), want)
            finally:
                torch.set_num_threads(1)


X = torch.randn(3, 8)
WRONG = {
    "not a tensor": (([1.0],), {}, TypeError, "x must be a tensor, got list"),
    "integers": ((X.int(),), {}, TypeError, "x must be float64, .* got torch.int32"),
    "a scalar": ((X[0, 0],), {}, ValueError, "x must have at least one dimension"),
    "no power of two": ((torch.ones(3, 100),), {}, ValueError, "from 1 to 32768, got 100: 64 and 128 are next to it"),
    "three": ((torch.ones(3),), {}, ValueError, "power of two from 1 to 32768, got 3: 2 and 4 are next to it"),
    "nothing": ((X[:, :0],), {}, ValueError, "power of two from 1 to 32768, got 0: the nearest is 1"),
    "too large": ((torch.ones(1 << 16),), {}, ValueError, "to 32768, got 65536: the nearest is 32768"),
    "signs no tensor": ((X, 1.0), {}, TypeError, "signs must be a tensor, got float"),
    "boolean signs": ((X, X[0] > 0), {}, TypeError, "signs must be floating or integer.* got torch.bool"),
    "complex signs": ((X, X[0] * 1j), {}, TypeError, "signs must be floating or integer.* got torch.complex64"),
    "signs of another size": ((X, torch.ones(4)), {}, ValueError, r"signs must have shape \(8,\).* got \(4,\)"),
    "signs per row": ((X, torch.ones(3, 8)), {}, ValueError, r"signs must have shape \(8,\).* got \(3, 8\)"),
    "signs elsewhere": ((X, X[0].to("meta")), {}, TypeError, "signs must be on x's device cpu, got meta"),
    "a tensor for scale": ((X,), {"scale": torch.tensor(1.0)}, TypeError, "scale must be a number, got Tensor"),
    "no finite scale": ((X,), {"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    "unknown backend": ((X,), {"backend": "cuda"}, ValueError, "backend must be None or one of .* got 'cuda'"),
}


@pytest.mark.parametrize("args, more, error, message", WRONG.values(), ids=WRONG)
def test_refuses(args, more, error, message):
    with pytest.raises(error, match=message):
        onchip.hadamard(*args, **more)


def test_what_triton_refuses_is_said():
    refusals = {name: onchip.explain(onchip.hadamard, x) for name, x in {"f64": X.double(), "plain": X}.items()}
    names = [candidate.name for candidate in refusals["plain"].candidates]
    assert names == ["cpu", "triton", "reference"]
    with pytest.raises(ValueError, match="backend='triton' cannot serve this call"):
        onchip.hadamard(X.double(), backend="triton")
    with pytest.raises(ValueError, match="backend='triton' cannot serve this call"):
        onchip.hadamard(torch.ones(8192), backend="triton")


def test_missing_kernels_are_said_once(monkeypatch):
    monkeypatch.setattr(_native, "missing", "the native kernels are on holiday")
    monkeypatch.setattr(_select, "_WARNED", set())
    with pytest.warns(UserWarning, match="hadamard runs on its slow reference: the native kernels are on holiday"):
        y = onchip.hadamard(X)
    assert torch.equal(y, onchip.hadamard(X, backend="reference"))
