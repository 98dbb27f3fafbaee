"""Launches whose kernels are held to a budget: of each operation the common case, and those that strain it.

An operation adds a line to `SPECIMENS`, and a function that makes its launches from tensors on the device "meta", which
have shapes and no elements. Kernels are imported only there, because TRITON_INTERPRET is read when they are.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from onchip.ops._triton import Launch

if TYPE_CHECKING:
    from onchip.ops.attention.triton.launches import Call, Saved

ALL = ("sm_80", "sm_90", "sm_100", "gfx942")


class Specimen(NamedTuple):
    """Makes the launches of one call for an architecture, and the architectures on which they are held to a budget."""

    launches: Callable[[str], Sequence[Launch]]
    architectures: tuple[str, ...] = ALL


def _attention(architecture: str, dtype: torch.dtype, dim: int) -> list[Launch]:
    """All passes over 4096 causal queries of 16 heads."""
    from onchip.ops.attention.triton import launches

    q, k, v = _meta((1, 4096, 16, dim), (1, 4096, 16, dim), (1, 4096, 16, dim), dtype=dtype)
    call = launches.Call(q, k, v, -1, 0, dim**-0.5, 0.0, None, None, None, None, None, (4096, 4096), architecture)
    out, lse = torch.empty_like(q), _float32(1, 16, 4096)
    saved = launches.Saved(torch.empty_like(out), lse, torch.empty_like(lse))
    return [*launches.attend(call, out, lse), *_backward(call, saved, out)]


def _attention_with_everything(architecture: str, dtype: torch.dtype, dim: int) -> list[Launch]:
    """All passes over packed sequences, heads in groups, with a window, a softcap and all that is added to logits."""
    from onchip.ops.attention.triton import launches

    q, k, v = _meta((4096, 16, dim), (4096, 4, dim), (4096, 4, dim), dtype=dtype)
    (bias,), (starts,) = _meta((1, 16, 1024, 1024), dtype=dtype), _meta((9,), dtype=torch.int32)
    terms = bias, _float32(16), _float32(16)
    call = launches.Call(q, k, v, 255, 0, dim**-0.5, 30.0, *terms, starts, starts, (1024, 1024), architecture)
    out, lse = torch.empty_like(q), _float32(16, 4096)
    saved = launches.Saved(torch.empty_like(out), lse, torch.empty_like(lse))
    grad_bias = launches.bias(call, saved, _float32(1, 16, 1024, 1024), per_query=True, per_key=True)
    return [*launches.attend(call, out, lse), *_backward(call, saved, out, grad_lse=lse, grad_slopes=lse), grad_bias]


def _block_sparse_attention(architecture: str, dtype: torch.dtype, dim: int) -> list[Launch]:
    """All passes over 4096 causal queries of 16 heads on 4 key heads, under a block mask."""
    from onchip.ops.attention.block_mask import BlockMask
    from onchip.ops.attention.triton import launches

    q, k, v = _meta((1, 4096, 16, dim), (1, 4096, 4, dim), (1, 4096, 4, dim), dtype=dtype)
    mask = BlockMask.local(4096, 4096, window=(500, 0), n_global=1).to("meta")
    settings = (-1, 0, dim**-0.5, 0.0, None, None, None, None, None, (4096, 4096), architecture)
    call = launches.Call(q, k, v, *settings, block_mask=mask)
    out, lse = torch.empty_like(q), _float32(1, 16, 4096)
    saved = launches.Saved(torch.empty_like(out), lse, torch.empty_like(lse))
    return [*launches.attend(call, out, lse), *_backward(call, saved, out)[1:]]


def _backward(
    call: "Call", saved: "Saved", out: Tensor, grad_lse: Tensor | None = None, grad_slopes: Tensor | None = None
) -> list[Launch]:
    from onchip.ops.attention.triton import launches

    return [
        launches.deltas(call, out, saved.grad_out, grad_lse, saved.delta),
        launches.keys_and_values(call, saved, torch.empty_like(call.k), torch.empty_like(call.v)),
        launches.queries(call, saved, torch.empty_like(call.q), grad_slopes),
    ]


def _decoding(architecture: str, dtype: torch.dtype, dim: int) -> list[Launch]:
    """One query of 32 heads over a long cache of 8: the pass over splits of the keys, and the one that combines."""
    from onchip.ops.attention.triton import launches

    q, k, v = _meta((1, 1, 32, dim), (1, 65536, 8, dim), (1, 65536, 8, dim), dtype=dtype)
    call = launches.Call(q, k, v, -1, 0, dim**-0.5, 0.0, None, None, None, None, None, (1, 65536), architecture)
    return launches.attend(call, torch.empty_like(q), _float32(1, 32, 1))


def _paged_decoding(architecture: str, dtype: torch.dtype, dim: int) -> list[Launch]:
    """The same over pages of 16 keys, for rows of different lengths: new keys, turned, and the pass over splits."""
    from onchip.ops.attention.triton import launches
    from onchip.ops.attention_with_cache.arguments import Call
    from onchip.ops.attention_with_cache.triton import CachedCall, append

    q, k, v = _meta((8, 1, 32, dim), (4096, 16, 8, dim), (4096, 16, 8, dim), dtype=dtype)
    ends, table = _meta((8,), (8, 4096), dtype=torch.int32)
    settings = (-1, 0, dim**-0.5, 0.0, None, None, None, None, None, (1, 65536), architecture)
    call = CachedCall(q, k, v, *settings, ends=ends, starts=None, table=table)
    (new,), turns = _meta((8, 1, 8, dim), dtype=dtype), _float32(65536, dim // 2)
    more = (-1, 0, dim**-0.5, 0.0, None, None, False)
    appending = Call(q, k, v, new, new, ends, None, table, turns, turns, None, True, *more)
    splits = launches.attend(call, torch.empty_like(q), _float32(8, 32, 1))[0]
    return [append.launch(appending, new, new, torch.empty_like(q)), splits]


def _batch_invariant(architecture: str, dtype: torch.dtype, dim: int) -> list[Launch]:
    """The forward pass over 4096 causal queries of 16 heads, of which each joins its splits itself."""
    from onchip.ops.attention.triton import launches

    q, k, v = _meta(*[(1, 4096, 16, dim)] * 3, dtype=dtype)
    settings = (-1, 0, dim**-0.5, 0.0, None, None, None, None, None, (4096, 4096), architecture)
    call = launches.Call(q, k, v, *settings, batch_invariant=True)
    return launches.attend(call, torch.empty_like(q), _float32(1, 16, 4096))


def _fp8(architecture: str, dim: int) -> list[Launch]:
    """Attention over 4096 causal queries of 16 heads that have been quantised."""
    from onchip.ops.attention.triton.launches import Call
    from onchip.ops.attention_fp8 import triton as fp8

    q, k, v = _meta(*[(1, 4096, 16, dim)] * 3, dtype=torch.float8_e4m3fn)
    settings = (-1, 0, dim**-0.5, 0.0, None, None, None, None, None, (4096, 4096), architecture)
    call, scales = Call(q, k, fp8.along_keys(v, None), *settings), _float32(1, 4096, 16)
    return [fp8.launch(call, scales, scales, scales, torch.empty_like(q, dtype=torch.bfloat16), _float32(1, 16, 4096))]


def _hadamard(architecture: str, dtype: torch.dtype, n: int) -> list[Launch]:
    from onchip.ops.hadamard import triton as hadamard

    (x,) = _meta((4096, 16, n), dtype=dtype)
    return [hadamard.launch(x, _float32(n), None, n**-0.5, x)]


def _selective_scan(architecture: str, dtype: torch.dtype, states: int) -> list[Launch]:
    """Both passes over two sequences of 2048 tokens of 1536 channels, with everything."""
    from onchip.ops.selective_scan import triton as scan
    from onchip.ops.selective_scan.arguments import Call

    x, B = _meta((2, 2048, 1536), (2, 2048, 1, states), dtype=dtype)
    A, D, state = _float32(1536, states), _float32(1536), _float32(2, 1536, states)
    call = Call(x, x, A, B, B, D, x, D, state, None, True)
    out, final_state, checkpoints = call.results(save=True)
    grads = (x, x, x, state, state, state, state, state, state)
    backward = scan.launch_backward(call, checkpoints, x, state, *grads)
    return [scan.launch_forward(call, out, final_state, checkpoints), backward]


def _causal_conv1d(architecture: str, dtype: torch.dtype, width: int) -> list[Launch]:
    """All passes with SiLU over packed sequences of 4096 rows and 2048 channels, and a step of a batch of 8."""
    from onchip.ops.causal_conv1d import triton as conv

    x, weight, bias, state, x_t = _meta(
        (4096, 2048), (2048, width), (2048,), (8, width - 1, 2048), (8, 2048), dtype=dtype
    )
    (starts,) = _meta((9,), dtype=torch.int32)
    call, sums = conv.describe(x, weight, bias, state, starts), _float32(16, width + 1, 2048)
    return [
        conv.convolve(call, width, True, x),
        conv.differentiate(call, width, True, x, x, sums),
        conv.differentiate_state(call, width, True, x, state),
        conv.move_on(x_t, state, weight, bias, True, x_t),
    ]


def _ssd(architecture: str, dtype: torch.dtype, dim: int, state_dim: int) -> list[Launch]:
    """All passes over 4096 steps of 24 heads that share B and C, with all that is fused; and a step of decoding."""
    from onchip.ops.ssd.call import Call
    from onchip.ops.ssd.triton import launches

    def call(time: int) -> Call:
        x, z, B = _meta((1, time, 24, dim), (1, time, 24, dim), (1, time, 1, state_dim), dtype=dtype)
        terms = _float32(24), z, _float32(24), _float32(1, 24, dim, state_dim)
        return Call(x, _float32(1, time, 24), _float32(24), B, B, *terms, None, True, 0.0, float("inf"), None)

    sequence, one, state = call(4096), call(1), _float32(1, 24, dim, state_dim)
    plan, x = launches.Plan.of_backward(sequence), sequence.x
    forward = launches.forward(launches.Plan.of(sequence), x, state)
    backward = launches.backward(plan, x, state, sequence.gradients(), launches.Partial.of(plan))
    return [*forward, *backward, launches.step(one, state, one.x)]


def _meta(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]


def _float32(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="meta")


# Compiling them all is to take no more than three minutes of two cores: not every case is on every architecture.
SPECIMENS = {
    "attention bfloat16 128": Specimen(partial(_attention, dtype=torch.bfloat16, dim=128)),
    "attention bfloat16 128, everything": Specimen(
        partial(_attention_with_everything, dtype=torch.bfloat16, dim=128), ("sm_80", "sm_90", "gfx942")
    ),
    "attention bfloat16 128, block-sparse": Specimen(partial(_block_sparse_attention, dtype=torch.bfloat16, dim=128)),
    "attention bfloat16 256": Specimen(
        partial(_attention, dtype=torch.bfloat16, dim=256), ("sm_80", "sm_90", "gfx942")
    ),
    "attention float16 64": Specimen(partial(_attention, dtype=torch.float16, dim=64), ("sm_80", "sm_90")),
    "attention float32 128": Specimen(partial(_attention, dtype=torch.float32, dim=128), ("sm_90",)),
    "attention float32 64": Specimen(partial(_attention, dtype=torch.float32, dim=64), ("sm_80",)),
    "decoding bfloat16 128": Specimen(partial(_decoding, dtype=torch.bfloat16, dim=128)),
    "paged decoding bfloat16 128": Specimen(partial(_paged_decoding, dtype=torch.bfloat16, dim=128)),
    "batch-invariant bfloat16 128": Specimen(
        partial(_batch_invariant, dtype=torch.bfloat16, dim=128), ("sm_80", "sm_90", "gfx942")
    ),
    "fp8 128": Specimen(partial(_fp8, dim=128), ("sm_90", "sm_100")),
    "selective scan bfloat16 16": Specimen(partial(_selective_scan, dtype=torch.bfloat16, states=16)),
    "causal_conv1d bfloat16 4": Specimen(partial(_causal_conv1d, dtype=torch.bfloat16, width=4)),
    "hadamard bfloat16 128": Specimen(partial(_hadamard, dtype=torch.bfloat16, n=128)),
    "ssd bfloat16 64, state 128": Specimen(partial(_ssd, dtype=torch.bfloat16, dim=64, state_dim=128)),
    "hadamard float32 4096": Specimen(partial(_hadamard, dtype=torch.float32, n=4096), ("sm_80", "gfx942")),
}
