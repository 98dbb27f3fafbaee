"""Its registration with PyTorch's dispatcher: a schema that says what is written to, kernels, and no gradient."""

from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from onchip.ops._library import library
from onchip.ops._read import read
from onchip.ops.attention.outputs import output_like
from onchip.ops.attention_with_cache import checks, cpu, reference
from onchip.ops.attention_with_cache.arguments import Call

library.define(  # type: ignore[no-untyped-call]
    "attention_with_cache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, "
    "Tensor cache_seqlens, Tensor? cache_leftpad, Tensor? block_table, Tensor? rotary_cos, Tensor? rotary_sin, "
    "Tensor? rotary_seqlens, bool rotary_interleaved, int left, int right, float scale, float softcap, "
    "Tensor? alibi_slopes, Tensor? sinks, bool batch_invariant, str backend) -> (Tensor out, Tensor lse)"
)

_attention_with_cache = torch.ops.onchip.attention_with_cache.default


def attention_with_cache(*args: Any) -> tuple[Tensor, Tensor]:
    """Call the op; arguments in the schema's order.

    The autograd kernel is called here, past the dispatcher: a kernel in Python costs a fifth of a decoding step's call.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return cast(tuple[Tensor, Tensor], _attention_with_cache(*args))
    return _without_gradient(*args)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    call, backend = Call(*args[:-1]), args[-1]
    values = _checked(call)
    if backend == "triton":
        # Imported late: it brings Triton, for which `import onchip` should not wait.
        triton = import_module("onchip.ops.attention_with_cache.triton")
        return cast(tuple[Tensor, Tensor], triton.forward(call, None if values is None else values[0]))
    if backend == "reference":
        return reference.forward(call)
    assert values is not None
    return cpu.forward(call, *values)


def _checked(call: Call) -> tuple[list[int], list[int] | None, list[int] | None] | None:
    """The lengths, left pads and positions, after a check of what depends on values; None where they cannot be read."""
    if call.q.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    lengths: list[int] = read(call.cache_seqlens).tolist()
    starts = None if call.cache_leftpad is None else read(call.cache_leftpad).tolist()
    positions = None if call.rotary_seqlens is None else read(call.rotary_seqlens).tolist()
    table = None if call.block_table is None else read(call.block_table)
    pages, size = call.k_cache.shape[:2]
    checks.check_values(lengths, starts, table, (pages, size), call.added)
    if call.rotary_cos is not None:
        queries = call.q.shape[1] if call.in_order else min(call.q.shape[1], 1)
        first = lengths if positions is None else positions
        checks.check_positions(first, call.rotary_cos.shape[0], max(call.added, queries))
    return lengths, starts, positions


for _device in ("CPU", "CUDA"):
    library.impl("attention_with_cache", _forward, _device)  # type: ignore[no-untyped-call]


@torch.library.register_fake("onchip::attention_with_cache", lib=library)  # type: ignore[untyped-decorator]
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    return output_like(q, k_cache, v_cache, None)


@torch.library.impl(library, "attention_with_cache", "Autograd")
def _without_gradient(*args: Any) -> tuple[Tensor, Tensor]:
    if (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)) or forward_ad._current_level >= 0:
        _refuse_gradients(args)
    with torch._C._AutoDispatchBelowAutograd():
        result = _attention_with_cache(*args)
    if args[3] is not None:
        torch.autograd.graph.increment_version(args[1:3])
    return cast(tuple[Tensor, Tensor], result)


def _refuse_gradients(args: tuple[Any, ...]) -> None:
    for name, x in zip(Call._fields, args, strict=False):
        if isinstance(x, Tensor) and ((torch.is_grad_enabled() and x.requires_grad) or _has_tangent(x)):
            raise RuntimeError(
                f"attention_with_cache is for inference, and a gradient with respect to {name} is asked for: "
                "onchip.attention has gradients; torch.no_grad() or detach() says that none is wanted"
            )


def _has_tangent(x: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
