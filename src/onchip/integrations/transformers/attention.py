"""onchip's attention behind transformers' interface: `attn_implementation="onchip"`.

transformers asks two functions for an implementation: one makes, once per forward pass, the mask that all layers of a
kind share; the other is called by every layer. Plain causal attention needs no mask here, windows are two integers,
padding is one boolean per key, and packed sequences are boundaries, so that a T×T mask is only made for patterns that
are none of these.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AttentionInterface, AttentionMaskInterface

from onchip.integrations.transformers import NAME
from onchip.ops import attention


def register() -> None:
    """Make `attn_implementation="onchip"` known to transformers; again does no harm."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


class CausalMask(Tensor):
    """A causal mask that is not written out: what a 4-D mask would say, in a window, and one boolean per key.

    `end` keys count, the later ones are places that a static cache has yet to fill; the last query sits on the last of
    the keys that count. `left` is how far back a query sees, None for all the way. `visible (B, 1, 1, end)` boolean is
    False where a key is padding; None where none is. `boundaries (sequences + 1,)` are those of packed sequences, rows
    of the batch one after the other; None where each row is one.

    It is a tensor because transformers takes only tensors of four dimensions for finished masks. Computing with it
    raises, as the result would be another mask; but that of packed sequences, which transformers makes for models that
    compute with theirs too, is written out for it by `write`.
    """

    visible: Tensor | None
    left: int | None
    end: int
    boundaries: Tensor | None
    write: Callable[[], Tensor | None] | None

    @classmethod
    def of(
        cls,
        visible: Tensor | None,
        left: int | None,
        end: int,
        device: torch.device | str,
        boundaries: Tensor | None = None,
        write: Callable[[], Tensor | None] | None = None,
    ) -> "CausalMask":
        """The mask with these properties."""
        tensor = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=device) if visible is None else visible
        mask: CausalMask = torch.Tensor._make_subclass(cls, tensor)
        mask.visible, mask.left, mask.end, mask.boundaries, mask.write = visible, left, end, boundaries, write
        return mask

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Its shape, dtype and device may be asked for, and it may go to another device."""
        if func in (Tensor.contiguous, Tensor.detach):  # as `generate` and checkpointing call them
            return args[0]
        if func is Tensor.to:
            return args[0]._moved(*args[1:], **(kwargs or {}))
        if getattr(func, "__name__", "") in _HARMLESS:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        masks = [x for x in tree_leaves((args, kwargs)) if type(x) is CausalMask]
        if all(mask.write is not None for mask in masks):
            return func(*tree_map(_written, args), **tree_map(_written, kwargs or {}))
        raise ValueError(
            f'attn_implementation="onchip" cannot serve a model that computes with its attention mask '
            f'({getattr(func, "__name__", func)}): attn_implementation="sdpa" can'
        )

    def _moved(self, *args: Any, **kwargs: Any) -> "CausalMask":
        with torch._C.DisableTorchFunctionSubclass():
            tensor = self.as_subclass(Tensor).to(*args, **kwargs)
        if tensor.dtype != torch.bool:
            raise ValueError(f'the masks of attn_implementation="onchip" are boolean, got to({tensor.dtype})')
        visible = None if self.visible is None else tensor
        boundaries = None if self.boundaries is None else self.boundaries.to(tensor.device)
        return CausalMask.of(visible, self.left, self.end, tensor.device, boundaries, self.write)


def _written(x: Any) -> Any:
    return x.write() if type(x) is CausalMask and x.write is not None else x


_HARMLESS = ("__get__", "dim", "size", "is_floating_point", "__repr__", "__len__")


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,  # static caches have a tensor
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """What the layers need to know: None, a `CausalMask`, or else transformers' own boolean `(B, 1, T, S)`."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    def written_out() -> Tensor | None:
        mask: Tensor | None = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function or causal_mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            config=config,
            device=device,
            **others,
        )
        return mask

    if torch.compiler.is_compiling():
        return written_out()
    packed = _packed_sequences(mask_function)
    if packed is not None and attention_mask is None:
        boundaries, left = packed
        return CausalMask.of(None, left, q_length, device, boundaries, written_out)
    if mask_function is bidirectional_mask_function and attention_mask is not None:
        visible = _visible(attention_mask, kv_offset, kv_length)
        return None if visible is None else visible.expand(-1, -1, q_length, -1)  # in memory one row for all queries
    causal = mask_function in (None, causal_mask_function) or _slides(config, local_size)
    if not allow_is_causal_skip or not causal:
        return written_out()
    end = int(q_offset) + q_length - kv_offset
    if not q_length <= end <= kv_length:
        return written_out()
    visible = None if attention_mask is None else _visible(attention_mask, kv_offset, end)
    left = local_size - 1 if local_size is not None and local_size < end else None
    if visible is None and left is None and (end == q_length or (q_length == 1 and end == kv_length)):
        return None
    return CausalMask.of(visible, left, end, device)


def _visible(attention_mask: Tensor, first: int, keys: int) -> Tensor | None:
    """`(B, 1, 1, keys)` boolean, False where a key is padding or beyond the mask's end; None where none is."""
    visible = torch.nn.functional.pad(attention_mask, (0, max(first + keys - attention_mask.shape[-1], 0)))
    visible = visible[:, None, None, first : first + keys]
    return None if bool(visible.all()) else visible


def _slides(config: Any, local_size: int | None) -> bool:
    """Whether a mask of this local size is a sliding causal window; the other kind that has one is cut in chunks."""
    chunked = getattr(config, "attention_chunk_size", None) is not None
    return local_size is not None and not chunked and getattr(config, "sliding_window", None) == local_size


def _packed_sequences(mask_function: Callable[..., Any] | None) -> tuple[Tensor, int | None] | None:
    """The boundaries and the `left` of transformers' causal mask of packed sequences; None for any other function.

    transformers says so in nothing but the function, which is taken apart here as
    `packed_sequence_compatibility_function` puts it together. What is put together in another way is written out.
    """
    from transformers.masking_utils import causal_mask_function

    match _captured(mask_function, "and_masks", "mask_functions"):
        case (apart, within):
            numbers = _captured(apart, "packed_sequence_mask_function", "packed_sequence_mask")
            inside = _captured(within, "remap_positions_for_packed_sequence", "mask_function")
        case _:
            return None
    left = None
    if inside is not causal_mask_function:
        match _captured(inside, "and_masks", "mask_functions"):
            case (overlay, plain) if plain is causal_mask_function:
                reach = _captured(overlay, "sliding_window_overlay", "sliding_window")
            case _:
                return None
        if not isinstance(reach, int):
            return None
        left = reach - 1
    if not isinstance(numbers, Tensor):
        return None
    begins = torch.ones_like(numbers, dtype=torch.bool)  # a token whose sequence is not that of the one before it
    begins[:, 1:] = numbers.diff(dim=1) != 0
    starts = begins.flatten().nonzero().flatten()
    return torch.nn.functional.pad(starts, (0, 1), value=numbers.numel()).int(), left


def _captured(function: Any, maker: str, name: str) -> Any:
    """What a function that transformers' `maker` made has captured under this name; None where it made another."""
    if getattr(function, "__qualname__", "").partition(".")[0] != maker or not function.__closure__:
        return None
    captured = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
    return captured[name].cell_contents if name in captured else None


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """A layer's attention: query `(B, H, T, D)`, key and value `(B, Hk, S, D)`; the output is `(B, T, H, D)`."""
    if not _REFUSED.keys().isdisjoint(others):
        _refuse(others)
    T, end = query.shape[2], key.shape[2]
    left, bias, packed = None, None, False
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if sliding_window is not None and sliding_window < end:
            if not causal:
                _cannot("sliding_window without causal attention and without a mask", "sdpa")
            left = sliding_window - 1
        causal = causal and (T > 1 or left is not None)
        if causal and T > 1 and cu_seq_lens_q is None:
            end = T  # a static cache at its beginning: the keys after these are yet to come
    elif type(attention_mask) is CausalMask:
        causal, left, end, bias = True, attention_mask.left, attention_mask.end, attention_mask.visible
        if bias is not None and cu_seq_lens_q is not None:
            raise ValueError(
                "cu_seq_lens_q cannot be given together with an attention_mask that hides padding: leave the padding "
                "out of the packed sequences, or give neither and position_ids that restart"
            )
        if attention_mask.boundaries is not None:
            cu_seq_lens_q = cu_seq_lens_k = attention_mask.boundaries
            packed = True
    else:
        causal, bias = False, attention_mask
    if end < key.shape[2]:
        key, value = key.narrow(2, 0, end), value.narrow(2, 0, end)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if cu_seq_lens_q is not None and bias is None:
        if query.shape[0] != 1 and not packed:
            raise ValueError(f"cu_seq_lens_q needs a batch of 1 that holds all sequences, got {query.shape[0]}")
        packed = True
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    out = attention(
        q,
        k,
        v,
        causal=causal,
        window=None if left is None else (left, 0),
        scale=scaling,
        softcap=softcap or 0.0,
        bias=bias,
        sinks=s_aux,
        cu_seqlens_q=cu_seq_lens_q if packed else None,
        cu_seqlens_k=cu_seq_lens_k if packed else None,
        dropout_p=dropout,
    )
    return (out.view(query.shape[0], T, *out.shape[1:]) if packed else out), None


_REFUSED = {
    "position_bias": "sdpa",
    "head_mask": "eager",
    "output_attentions": "eager",
    "cache": "sdpa",
    "indices": "eager",
    "block_indices": "eager",
    "sinks": "eager",
}


def _refuse(others: dict[str, Any]) -> None:
    for name in others.keys() & _REFUSED.keys():
        if others[name] is not None and others[name] is not False:
            _cannot(name, _REFUSED[name])


def _cannot(what: str, instead: str) -> NoReturn:
    raise ValueError(f'attn_implementation="onchip" has no {what}: attn_implementation="{instead}" has')
