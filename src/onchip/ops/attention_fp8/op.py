"""FP8 attention's registration with PyTorch's dispatcher: schema, kernels, fake kernel, and no gradient."""

from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from onchip.ops._library import library
from onchip.ops.attention.outputs import output_like
from onchip.ops.attention_fp8 import incoherent, reference
from onchip.ops.attention_fp8.quantize import blocks, quantize

library.define(  # type: ignore[no-untyped-call]
    "attention_fp8(Tensor q, Tensor k, Tensor v, int left, int right, float scale, float softcap, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool block_scales, int? seed, str backend)"
    " -> (Tensor out, Tensor lse)"
)

_attention_fp8 = torch.ops.onchip.attention_fp8.default


def attention_fp8(*args: Any) -> tuple[Tensor, Tensor]:
    """Call the op; arguments in the schema's order, `seed` None for no incoherent processing."""
    return cast(tuple[Tensor, Tensor], _attention_fp8(*args))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_scales: bool,
    seed: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    in_triton = backend == "triton"
    # Imported late: it brings Triton, for which `import onchip` should not wait.
    implementation = import_module("onchip.ops.attention_fp8.triton") if in_triton else reference
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        implementation.check_lengths(q, k, cu_seqlens_q, cu_seqlens_k)
    with torch.autocast(q.device.type, enabled=False):  # what follows is in float32 where it says so
        of_queries, of_keys = blocks(q, cu_seqlens_q, block_scales), blocks(k, cu_seqlens_k, block_scales)
        turned = [q, k]
        if seed is not None:
            turned = [incoherent.rotate(x, seed, None if in_triton else "reference") for x in turned]
        quantized = (quantize(turned[0], of_queries), quantize(turned[1], of_keys), quantize(v, of_keys))
        settings = (left, right, scale, softcap, cu_seqlens_q, cu_seqlens_k)
        out, lse = output_like(q, k, v, cu_seqlens_q)
        implementation.attention(*quantized, *settings, out, lse)
    return out, lse


for _device in ("CPU", "CUDA"):
    library.impl("attention_fp8", _forward, _device)  # type: ignore[no-untyped-call]


@torch.library.register_fake("onchip::attention_fp8", lib=library)  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    return output_like(q, k, v, cu_seqlens_q=more[4])


@torch.library.impl(library, "attention_fp8", "Autograd")
def _inference_only(*args: Any) -> Any:
    for name, x in zip("qkv", args[:3], strict=True):
        if (torch.is_grad_enabled() and x.requires_grad) or _has_tangent(x):
            raise RuntimeError(
                f"attention_fp8 is for inference, and a gradient with respect to {name} is asked for: "
                "onchip.attention has gradients; torch.no_grad() or detach() says that none is wanted"
            )
    with torch._C._AutoDispatchBelowAutograd():
        return _attention_fp8(*args)


def _has_tangent(x: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
