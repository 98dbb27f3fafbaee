"""Attention against PyTorch's own: what runs, the check it must pass before it is timed, and the timing of one case.

Every contender gets its inputs in the layout it likes best: (B, T, H, D) for onchip, (B, H, T, D), contiguous, for
PyTorch's functions. Nothing but the call is timed.
"""

import dataclasses
import datetime
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

import onchip
from onchip.bench import memory
from onchip.bench.cases import Case
from onchip.bench.ceilings import GIGABYTE, Ceiling, copying, products, reading, significant
from onchip.bench.machine import Machine
from onchip.bench.rows import Row
from onchip.bench.timing import Candidate, Quartiles, interleave, quartiles, ratio
from onchip.ops.attention import reference

# Elements of the (B, H, T, T) logits above which the peer that writes them, several times, is left out.
MATH_LIMIT = {"cpu": 8 * 2048**2, "cuda": 2**31}
BLOCK = 512  # query rows that the check computes at a time


@dataclass(frozen=True)
class Inputs:
    """q, k, v (which require gradients where the case has them) and the gradient of the output: (B, T, H, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor

    @property
    def nbytes(self) -> int:
        """What they occupy."""
        tensors = (self.q, self.k, self.v, self.grad_out) if self.q.requires_grad else (self.q, self.k, self.v)
        return sum(x.nbytes for x in tensors)

    @classmethod
    def random(cls, case: Case, device: torch.device) -> "Inputs":
        """Standard normal, the same on every run."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(length: int, heads: int) -> Tensor:
            shape = (case.batch, length, heads, case.head_dim)
            return torch.randn(shape, generator=generator, device=device).to(getattr(torch, case.dtype))

        q, k, v = (
            normal(length, heads).requires_grad_(case.grad)
            for length, heads in ((case.q_len, case.heads), (case.k_len, case.heads_kv), (case.k_len, case.heads_kv))
        )
        return cls(q, k, v, normal(case.q_len, case.heads))

    def heads_first(self) -> "Inputs":
        """The same values as contiguous (B, H, T, D)."""
        q, k, v = (
            x.detach().transpose(1, 2).contiguous().requires_grad_(x.requires_grad) for x in (self.q, self.k, self.v)
        )
        return Inputs(q, k, v, self.grad_out.transpose(1, 2).contiguous())


@dataclass(frozen=True)
class Contender:
    """One implementation at one case: `call` gives the output, and the gradients of q, k and v where there are any.

    Where the backward pass is `alone`, the first call runs the forward pass, too.
    """

    call: Callable[[], tuple[Tensor, ...]]
    inputs: Inputs
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    heads_first: bool = True

    def results(self) -> tuple[Tensor, ...]:
        """What `call` gives, (B, T, H, D)."""
        with self.scope():
            results = self.call()
        return tuple(x.detach().transpose(1, 2) if self.heads_first else x.detach() for x in results)


SDPA_BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}


def contender(name: str, case: Case, device: torch.device) -> Contender:
    """`onchip`, or the peer of that name, with inputs of its own."""
    inputs = Inputs.random(case, device)
    if name == "onchip":
        return Contender(_pass(_onchip(case), inputs, case.alone), inputs, heads_first=False)
    inputs = inputs.heads_first()
    if name == "flex":
        return Contender(_pass(_flex(case, device), inputs, case.alone), inputs)
    call = _pass(_sdpa(case, device), inputs, case.alone)
    if name == "sdpa":
        return Contender(call, inputs)
    return Contender(call, inputs, lambda: sdpa_kernel(SDPA_BACKENDS[name]))


def peers(case: Case, device: torch.device, *, flex: bool = False) -> list[str]:
    """The peers that can run the case; the first is the one that onchip's error is held against."""
    if case.suite == "overhead":  # there, choosing the kernel is part of the price
        return ["sdpa"]
    writes_logits = case.batch * case.heads * case.q_len * case.k_len
    names = [name for name in SDPA_BACKENDS if name != "sdpa_math" or writes_logits <= MATH_LIMIT[device.type]]
    serving = [name for name in names if _serves(name, case, device)]
    has_flex = flex and not (case.grad and device.type == "cpu")  # where it has no backward
    return serving + ["flex"] * has_flex


def small(case: Case) -> Case:
    """The same call over few tokens."""
    return dataclasses.replace(case, q_len=min(case.q_len, 16), k_len=min(case.k_len, 16))


def served_by(case: Case, device: torch.device) -> str:
    """The name of the implementation behind `onchip.attention` for this case."""
    inputs = Inputs.random(case, device)
    explanation = onchip.explain(onchip.attention, inputs.q, inputs.k, inputs.v, **_mask(case))
    assert explanation.chosen is not None
    return explanation.chosen


def measure(
    case: Case, device: torch.device, machine: Machine, *, seconds: float = 3.0, min_rounds: int = 5, flex: bool = False
) -> Row:
    """Check the case, time it, and say what was found.

    Raises:
        ArithmeticError: onchip's result is further from the truth than the rule of `check` allows. Nothing was timed.
    """
    runners = {name: contender(name, case, device) for name in ["onchip", *peers(case, device, flex=flex)]}
    check(case, *list(runners.values())[:2])
    threads = 1 if case.suite == "overhead" else machine.threads  # the price of a call, not of waking threads
    row = Row(
        case=case,
        machine=dataclasses.replace(machine, threads=threads),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        served_by=served_by(case, device),
    )
    if case.suite == "memory":
        extra = {name: significant(memory.extra_in_subprocess(case, name, device)) for name in runners}
        return dataclasses.replace(row, extra=extra)
    ceiling = ceiling_of(case, device)
    candidates = {name: Candidate(c.call, c.scope) for name, c in runners.items()} | {ceiling.name: ceiling.candidate}
    with threads_set(threads):
        times = interleave(candidates, device, seconds=seconds, min_rounds=min_rounds)
    amount = case.operations if ceiling.name == "mm" else case.cache_bytes
    return dataclasses.replace(
        row,
        rounds=len(times["onchip"]),
        ms={name: rounded(quartiles([1e3 * t for t in values])) for name, values in times.items()},
        ratio={name: rounded(ratio(times[name], times["onchip"])) for name in list(runners)[1:]},
        of=ceiling.name,
        fraction=ceiling.fraction(amount, times),
        rate=ceiling.rates(amount, times),
    )


def check(case: Case, ours: Contender, peer: Contender) -> None:
    """Our error is at most twice the peer's, plus 4 ulps of the largest value.

    Raises:
        ArithmeticError: naming the tensor and both errors.
    """
    for error in errors(case, ours, peer):
        judge(case.label, error)


class Error(NamedTuple):
    """Of a tensor, the largest distance from float64 of ours and of the peer's, and the largest value."""

    name: str
    ours: float
    peer: float
    largest: float
    eps: float

    @property
    def allowed(self) -> float:
        """How far ours may be off."""
        return 2 * self.peer + 4 * self.eps * self.largest


def judge(label: str, error: Error) -> None:
    """Hold an error to the rule.

    Raises:
        ArithmeticError: naming the tensor and both errors.
    """
    found = f"{label}: {error.name} is off by {error.ours:.1e}, the peer's by {error.peer:.1e}"
    if not error.peer <= 0.1 * error.largest:
        raise ArithmeticError(f"{found}: the peer computes something else")
    if not error.ours <= error.allowed:
        raise ArithmeticError(found)


def errors(case: Case, ours: Contender, peer: Contender) -> Iterator[Error]:
    """The errors of the output, and of the gradients where there are any, over the first key head's group."""
    results = zip(truth(case, ours.inputs), ours.results(), peer.results(), strict=True)
    for name, (want, *found) in zip(("out", "grad q", "grad k", "grad v"), results, strict=False):
        our, other = ((x[:, :, : want.shape[2]].double() - want).abs().max().item() for x in found)
        yield Error(name, our, other, want.abs().max().item(), torch.finfo(found[0].dtype).eps)


def truth(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """The first key head's group in float64 by the definition, a block of rows at a time: T×T logits need not fit."""
    group = case.heads // case.heads_kv
    q, k, v, grad_out = (
        x[:, :, :heads].detach().double()
        for x, heads in ((inputs.q, group), (inputs.k, 1), (inputs.v, 1), (inputs.grad_out, group))
    )
    out, grads = torch.empty_like(q), tuple(torch.zeros_like(x) for x in (q, k, v))
    left = case.window - 1 if case.window else -1
    for start in range(0, case.q_len, BLOCK):
        stop = min(start + BLOCK, case.q_len)
        # Masks are aligned at the last query and the last key: cut the keys that come after the block's last query.
        keys = case.k_len - case.q_len + stop if case.causal else case.k_len
        block = [x.clone().requires_grad_(case.grad) for x in (q[:, start:stop], k[:, :keys], v[:, :keys])]
        right = 0 if case.causal else -1
        out_block, _ = reference.attention_with_lse(*block, left=left, right=right)
        out[:, start:stop] = out_block.detach()
        if case.grad:
            rows = (slice(start, stop), slice(keys), slice(keys))
            found = torch.autograd.grad(out_block, block, grad_out[:, start:stop])
            for grad, row, part in zip(grads, rows, found, strict=True):
                grad[:, row] += part
    return (out, *grads) if case.grad else (out,)


def _pass(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs, alone: bool
) -> Callable[[], tuple[Tensor, ...]]:
    q, k, v = inputs.q, inputs.k, inputs.v
    forward: Callable[[], Tensor] = functools.partial(function, q, k, v)
    if alone:
        forward = functools.cache(forward)

    def forward_and_backward() -> tuple[Tensor, ...]:
        out = forward()
        return (out, *torch.autograd.grad(out, (q, k, v), inputs.grad_out, retain_graph=alone))

    return forward_and_backward if q.requires_grad else lambda: (forward(),)


def _mask(case: Case) -> dict[str, Any]:
    return {"causal": case.causal, "window": (case.window - 1, None)} if case.window else {"causal": case.causal}


def _onchip(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return functools.partial(onchip.attention, **_mask(case)) if case.causal else onchip.attention


def _sdpa(case: Case, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    options: dict[str, Any] = {"enable_gqa": True} if case.heads != case.heads_kv else {}
    if case.causal and (case.window or case.q_len != case.k_len):  # its own causal mask is aligned top-left
        options["attn_mask"] = _dense_mask(case, device)
    elif case.causal:
        options["is_causal"] = True
    return functools.partial(sdpa, **options)


def _dense_mask(case: Case, device: torch.device) -> Tensor:
    behind = torch.arange(case.q_len, device=device)[:, None] - torch.arange(case.k_len, device=device)[None, :]
    behind += case.k_len - case.q_len
    return (behind >= 0) & (behind < (case.window or case.k_len))


def _flex(case: Case, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    offset, window = case.k_len - case.q_len, case.window or case.k_len

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i + offset >= j) & (i + offset - j < window)

    mask = create_block_mask(visible, None, None, case.q_len, case.k_len, device.type) if case.causal else None
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = case.heads != case.heads_kv
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=gqa)


def _serves(name: str, case: Case, device: torch.device) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in which PyTorch explains why a backend does not serve
            # A GPU's libraries refuse some shapes and not others, and are quick to ask.
            contender(name, small(case) if device.type == "cpu" else case, device).results()
    except RuntimeError:
        return False
    return True


def ceiling_of(case: Case, device: torch.device) -> Ceiling:
    """A product of matrices in the case's dtype; for decoding, memory: read on a CPU, copied on a GPU."""
    if case.suite != "decode":
        return products(case.dtype, device)
    return copying(2 * GIGABYTE, device) if device.type == "cuda" else reading(GIGABYTE // 4, device)


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """That many threads, and then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rounded(values: Quartiles) -> Quartiles:
    """As they are kept."""
    return Quartiles(*map(significant, values))
