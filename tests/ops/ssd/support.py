"""What the tests of ssd share: calls with gradients of both outputs, running them, and the formula as a loop."""

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
    """`out`, `state` and, by the name of the input, the gradients."""
    return differentiate(case, lambda **call: onchip.ssd(**call, return_final_state=True, backend=backend))


def differentiate(case: Case, ssd: Any) -> dict[str, Tensor]:
    """`run` for any function that takes `onchip.ssd`'s arguments and returns both results."""
    leaves = {n: case[n].detach().requires_grad_() for n in DIFFERENTIABLE if case[n] is not None}
    out, state = ssd(**(case.arguments | leaves))
    weights = (case.grad_out, case.grad_state.to(state.dtype))
    grads = torch.autograd.grad((out, state), tuple(leaves.values()), weights, materialize_grads=True)
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
    batch, time, heads, dim = x.shape
    per_head = [h * B.shape[2] // heads for h in range(heads)]
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    if dt_limit is not None:
        dt = dt.clamp(*dt_limit)
    state = x.new_zeros(batch, heads, dim, B.shape[-1]) if initial_state is None else initial_state
    outputs = [x[:, :0]]
    for t in range(time):
        decay = torch.exp(dt[:, t] * A)
        added = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t, per_head])
        state = decay[..., None, None] * state + added
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t, per_head])[:, None])
    out = torch.cat(outputs, 1)
    if D is not None:
        out = out + (D if D.ndim == 2 else D[:, None]) * x
    return out if z is None else out * silu(z), state


def assert_exact(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Agreement in float64, where every difference but rounding is a mistake."""
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
