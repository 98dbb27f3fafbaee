"""Calls to the selective scan, and how they are run and differentiated."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import onchip

F64 = torch.float64
PER_TOKEN = ("x", "dt", "B", "C", "z")
TENSORS = (*PER_TOKEN, "A", "D", "dt_bias", "initial_state")


@dataclass(frozen=True)
class Case:
    """A call's arguments, and the gradients that its output and its final state receive."""

    arguments: dict[str, Any]
    grad_out: Tensor
    grad_state: Tensor
    backend: str | None = field(default=None)

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def replace(self, **arguments: Any) -> "Case":
        return replace(self, arguments=self.arguments | arguments)

    def to(self, dtype: torch.dtype, *, parameters: torch.dtype | None = None) -> "Case":
        """Tokens in `dtype`; what channels have in `parameters`, by default float32 at least."""
        own = parameters or (F64 if dtype == F64 else torch.float32)
        kept = {n: v for n, v in self.arguments.items() if not (isinstance(v, Tensor) and v.is_floating_point())}
        cast = {n: self[n].to(dtype if n in PER_TOKEN else own) for n in TENSORS if self[n] is not None}
        return Case(kept | cast, self.grad_out.to(dtype), self.grad_state.to(F64 if dtype == F64 else torch.float32))


def case(batch=2, time=10, channels=6, states=4, groups=2, *, lengths=None, decay=1.0, seed=0, **more: Any) -> Case:
    """A call with everything, in float64; `lengths` packs sequences of these lengths. Arguments of `more` win."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    tokens = (batch, time) if lengths is None else (sum(lengths),)
    sequences = batch if lengths is None else len(lengths)
    arguments = {
        "x": randn(*tokens, channels),
        "dt": randn(*tokens, channels),
        "A": -decay * (0.1 + randn(channels, states).abs()),
        "B": randn(*tokens, groups, states),
        "C": randn(*tokens, groups, states),
        "D": randn(channels),
        "z": randn(*tokens, channels),
        "dt_bias": randn(channels),
        "dt_softplus": True,
        "initial_state": randn(sequences, channels, states),
    }
    if not (arguments | more)["dt_softplus"]:  # time goes forward, or states grow without bounds
        arguments |= {n: arguments[n].abs() for n in ("dt", "dt_bias")}
    if lengths is not None:
        starts = torch.tensor([0, *lengths]).cumsum(0)
        arguments["cu_seqlens"] = starts.to(torch.int32)
    return Case(arguments | more, randn(*tokens, channels), randn(sequences, channels, states))


PLAIN = {"D": None, "z": None, "dt_bias": None, "initial_state": None}
FEATURES = {
    "everything": {},
    "plain": PLAIN,
    "a gate": {"D": None, "dt_bias": None, "initial_state": None},
    "no softplus": {"dt_softplus": False, "dt_bias": None},
    "a bias without softplus": {"dt_softplus": False, "initial_state": None},
}


def forward(call: Case, backend: str | None = None, scan: Any = onchip.selective_scan) -> dict[str, Tensor]:
    """The output and the final state."""
    out, final_state = scan(**call.arguments, return_final_state=True, backend=backend)
    return {"out": out, "final_state": final_state}


def run(call: Case, backend: str | None = None, scan: Any = onchip.selective_scan) -> dict[str, Tensor]:
    """The output, the final state, and the gradients of all tensors by name."""
    leaves = {n: call[n].detach().clone(memory_format=torch.preserve_format) for n in TENSORS if call[n] is not None}
    leaves = {n: _like(call[n], x).requires_grad_() for n, x in leaves.items()}
    result = tuple(scan(**(call.arguments | leaves), return_final_state=True, backend=backend))
    # The reference's results depend on nothing where there are no tokens.
    pairs = [(y, g) for y, g in zip(result, (call.grad_out, call.grad_state), strict=True) if y.requires_grad]
    grads = torch.autograd.grad([y for y, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True)
    zeros = {n: torch.zeros_like(x) for n, x in leaves.items()}
    found = {n: zeros[n] if g is None else g for n, g in zip(leaves, grads, strict=True)}
    return {"out": result[0].detach(), "final_state": result[1].detach(), **found}


def _like(x: Tensor, copy: Tensor) -> Tensor:
    """A copy with x's own strides, where it is a view that does not overlap itself."""
    if 0 in x.stride():
        return copy
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)


def assert_exact(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Agreement in float64, where every difference but rounding is a mistake."""
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
