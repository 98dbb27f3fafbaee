"""What the tests of ssd share: calls with gradients of both outputs, running them, and the formula as a loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

import onchip

F64 = torch.float64
LOW = (torch.float32, torch.bfloat16, torch.float16)
IN_X_DTYPE = ("x", "B", "C", "z")
DIFFERENTIABLE = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


@dataclass(frozen=True, repr=False)
class Case:
    """A call to `onchip.ssd`, the backend left out, and the gradients of its outputs."""

    arguments: dict[str, Any]
    grad_out: Tensor
    grad_state: Tensor

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def __repr__(self) -> str:
        show = lambda x: f"{x.dtype} {tuple(x.shape)} {x.stride()}" if isinstance(x, Tensor) else repr(x)  # noqa: E731
        return "Case(" + ", ".join(f"{name}: {show(x)}" for name, x in self.arguments.items()) + ")"

    def to(self, dtype: torch.dtype) -> "Case":
        """The same values, as far as `dtype` holds them; dt, A, D, dt_bias and the state in no less than float32."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        cast = {
            name: x.to(dtype if name in IN_X_DTYPE else wide) if name in DIFFERENTIABLE and x is not None else x
            for name, x in self.arguments.items()
        }
        return replace(self, arguments=cast, grad_out=self.grad_out.to(dtype), grad_state=self.grad_state.to(wide))

    def on(self, device: str) -> "Case":
        """The same call on another device, with the same strides."""
        moved = {name: _moved(x, device) if isinstance(x, Tensor) else x for name, x in self.arguments.items()}
        return Case(moved, self.grad_out.to(device), self.grad_state.to(device))

    def but(self, **arguments: Any) -> "Case":
        """The same call with other arguments."""
        return replace(self, arguments=self.arguments | arguments)


def randn_case(
    batch: int,
    time: int,
    heads: int = 2,
    dim: int = 5,
    groups: int = 1,
    state: int = 7,
    *,
    cu_seqlens: list[int] | None = None,
    rate: float = 1.0,
    **more: Any,
) -> Case:
    """A float64 call on random inputs; a packed one (with `batch` 1) where boundaries are given.

    In `more`, True for D, z, dt_bias or initial_state draws it; "wide" for D draws one of shape (H, P). `rate`
    multiplies A.
    """
    draw = lambda *shape: torch.randn(*shape, dtype=F64)  # noqa: E731
    rows = (batch, time) if cu_seqlens is None else (time,)
    states = batch if cu_seqlens is None else len(cu_seqlens) - 1
    x, B, C = draw(*rows, heads, dim), draw(*rows, groups, state), draw(*rows, groups, state)
    dt, A = torch.rand(*rows, heads, dtype=F64), -rate * torch.rand(heads, dtype=F64)
    shapes = {
        "D": (heads, dim) if more.get("D") == "wide" else (heads,),
        "z": x.shape,
        "dt_bias": (heads,),
        "initial_state": (states, heads, dim, state),
    }
    drawn = {name: draw(*shape) for name, shape in shapes.items() if more.get(name)}
    boundaries = {} if cu_seqlens is None else {"cu_seqlens": torch.tensor(cu_seqlens)}
    arguments = {"x": x, "dt": dt, "A": A, "B": B, "C": C} | more | drawn | boundaries
    return Case(arguments, draw(*x.shape), draw(*shapes["initial_state"]))


ALL_TERMS = {
    "D": True,
    "z": True,
    "dt_bias": True,
    "dt_softplus": True,
    "dt_limit": (0.4, 1.5),
    "initial_state": True,
}


def run(case: Case, backend: str) -> dict[str, Tensor]:
    """`out`, `state` and, by the name of the input, the gradients; Triton's from a GPU where there is one."""
    if backend == "triton" and torch.cuda.is_available():
        case = case.on("cuda")
    results = differentiate(case, lambda *x, **more: onchip.ssd(*x, **more, return_final_state=True, backend=backend))
    return {name: x.cpu() for name, x in results.items()}


def differentiate(case: Case, ssd: Any) -> dict[str, Tensor]:
    """`run` for any function that takes `onchip.ssd`'s arguments and returns both results."""
    leaves = {n: case[n].detach().requires_grad_() for n in DIFFERENTIABLE if isinstance(case[n], Tensor)}
    arguments = case.arguments | leaves
    inputs = [arguments.pop(name) for name in ("x", "dt", "A", "B", "C")]
    out, state = ssd(*inputs, **arguments)
    outputs = [(out, case.grad_out), (state, case.grad_state.to(state.dtype))]
    differentiable = [pair for pair in outputs if pair[0].requires_grad]  # no time and no initial state: zeros
    results, weights = zip(*differentiable, strict=True)
    grads = torch.autograd.grad(results, tuple(leaves.values()), weights, materialize_grads=True)
    return {"out": out.detach(), "state": state.detach()} | dict(zip(leaves, grads, strict=True))


def recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    chunk_size: int | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula of the docstring, one step of time after another, in the inputs' own dtypes."""
    batch, _, heads, dim = x.shape
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    if dt_limit is not None:
        dt = dt.clamp(*dt_limit)
    state = x.new_zeros(batch, heads, dim, B.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for x_t, dt_t, B_t, C_t in zip(*(t.unbind(1) for t in (x, dt, B, C)), strict=True):
        added = torch.einsum("bh,bhp,bhn->bhpn", dt_t, x_t, B_t)
        state = torch.exp(dt_t * A)[..., None, None] * state + added
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C_t))
    out = torch.stack(outputs, 1) if outputs else x[:, :0]
    if D is not None:
        out = out + (D if D.ndim == 2 else D[:, None]) * x
    return out if z is None else out * silu(z), state


def assert_exact(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Agreement in float64, where every difference but rounding is a mistake.

    Rounding is measured by the largest element: where a state grows, others are differences of large terms.
    """
    assert got.keys() == want.keys()
    for name in want:
        largest = want[name].abs().max().item() if want[name].numel() else 0.0
        torch.testing.assert_close(
            got[name],
            want[name],
            rtol=1e-10,
            atol=1e-10 * max(largest, 1.0),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_twice_eager(case: Case, backend: str) -> None:
    """An error, against the reference in float64, of at most twice that of the recurrence in the same dtypes.

    On top come one rounding to the result's dtype and four of float32 of the terms that the result sums: where eager
    happens to be exact, twice its error is nothing.
    """
    got, plain, exact = run(case, backend), differentiate(case, eager), run(case.to(F64), "reference")
    sizes = run(_magnitudes(case.to(F64)), "reference")
    for name, want in exact.items():
        if want.numel() == 0:
            continue
        error, eagers = ((x[name].double() - want).abs() for x in (got, plain))
        slack = torch.finfo(got[name].dtype).eps * want.abs() + 4 * torch.finfo(torch.float32).eps * sizes[name].abs()
        excess = (error - 2 * eagers.max() - slack).max()
        assert excess <= 0, f"{name}: error {error.max():.3e}, eager's {eagers.max():.3e}, {excess:.3e} too much"


def eager(x: Tensor, *inputs: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    """The recurrence as one writes it in PyTorch: every step in x's dtype; packed sequences one by one."""
    if (starts := more.pop("cu_seqlens", None)) is not None:
        return _one_by_one(starts.tolist(), (x, *inputs), more)
    cast = lambda t: t.to(x.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
    return recurrence(x, *map(cast, inputs), **{name: cast(t) for name, t in more.items()})


def _one_by_one(starts: list[int], inputs: tuple[Tensor, ...], more: dict[str, Any]) -> tuple[Tensor, Tensor]:
    x, dt, A, B, C = inputs
    parts = []
    for i, rows in enumerate(map(slice, starts[:-1], starts[1:])):
        own = {"z": more["z"][None, rows], "initial_state": more["initial_state"][i : i + 1]}
        parts.append(eager(x[None, rows], dt[None, rows], A, B[None, rows], C[None, rows], **(more | own)))
    return torch.cat([y[0] for y, _ in parts]), torch.cat([state for _, state in parts])


def _magnitudes(case: Case) -> Case:
    """The call on the inputs' magnitudes: no term of its sums cancels another."""
    positive = {n: case[n].abs() for n in ("x", "B", "C", "D", "initial_state") if case[n] is not None}
    return replace(case.but(**positive), grad_out=case.grad_out.abs(), grad_state=case.grad_state.abs())


def lay_out(x: Tensor, how: str) -> Tensor:
    """`x` with other strides, in storage that is NaN wherever x has no element."""
    if how == "heads outermost":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2) if x.ndim >= 3 else x
    if how == "last outermost":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if how == "every other":
        storage = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
        storage[..., ::2] = x
        return storage[..., ::2]
    if how == "inside a larger tensor":
        storage = torch.full([n + 3 for n in x.shape], torch.nan, dtype=x.dtype)
        return storage[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)
    return x.contiguous()


def _moved(x: Tensor, device: str) -> Tensor:
    """`x` with its strides, and with what its storage holds besides."""
    elements = x.untyped_storage().nbytes() // x.itemsize
    return x.detach().as_strided((elements,), (1,), 0).to(device).as_strided(x.shape, x.stride(), x.storage_offset())


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Run with n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
