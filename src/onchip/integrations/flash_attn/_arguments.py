"""What flash-attn's arguments mean to `onchip.attention_with_lse`."""

from torch import Tensor

Window = tuple[int, int]


def window(sides: Window) -> tuple[int | None, int | None]:
    """A window in which a negative side, -1 by custom, is unlimited."""
    if not isinstance(sides, tuple | list) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise ValueError(f"window_size must be a pair (left, right) of integers, -1 for no limit, got {sides!r}")
    left, right = (None if side < 0 else side for side in sides)
    return left, right


def no_dropout(dropout_p: float) -> None:
    """Refuse dropout."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0.0:
        raise NotImplementedError(
            f"dropout_p must be 0, got {dropout_p}: it is not handed on to onchip. Call the model's eval(), or set "
            "its attention dropout to 0 in its configuration"
        )


def unpack(name: str, packed: Tensor, parts: int, packed_rows: bool) -> tuple[Tensor, ...]:
    """The q, k and v, or k and v, that lie side by side before the heads; their gradients meet there again."""
    rank = 4 if packed_rows else 5
    if packed.ndim != rank or packed.shape[-3] != parts:
        rows = "total" if packed_rows else "batch, time"
        raise ValueError(f"{name} must have shape ({rows}, {parts}, heads, dim), got {tuple(packed.shape)}")
    return packed.unbind(-3)
