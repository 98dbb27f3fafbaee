"""The logits of a tile, in units of log 2, from the products of its queries and keys.

Rows and keys come as `(rows, 1)` and `(1, keys)` or the other way round: the gradients of keys and values are computed
from the transposed tile.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


class RowTile(NamedTuple):
    """What is known of each row of a tile: its query, that query's own key, its head, and its terms in the logits."""

    query: Any
    position: Any
    head: Any
    inside: Any
    slope: Any
    bias: Any


@triton.jit
def rows_of(row, kv_head, terms, place, F: tl.constexpr):
    """The rows of these numbers in a sequence; terms that are absent are zero."""
    query, head = row // F.group, kv_head * F.group + row % F.group
    inside = query < place.tq
    slope, bias = 0.0, 0
    if terms.slopes.ptr is not None:
        slope = (
            tl.load(terms.slopes.ptr + place.b * terms.slopes.batch + head * terms.slopes.head).to(tl.float32) * LOG2E
        )
    if terms.bias.ptr is not None:
        bias = place.b.to(tl.int64) * terms.bias.batch + head.to(tl.int64) * terms.bias.head
        bias += query.to(tl.int64) * terms.bias.query
    return RowTile(query, query + (place.tk - place.tq), head, inside, slope, bias)


@triton.jit
def along(rows, terms, AXIS: tl.constexpr):
    """The same rows with a new dimension, as `logits` takes them: 1 for (rows, 1), 0 for (1, rows)."""
    slope, bias = rows.slope, rows.bias
    if terms.slopes.ptr is not None:
        slope = tl.expand_dims(slope, AXIS)
    if terms.bias.ptr is not None:
        bias = tl.expand_dims(bias, AXIS)
    query, position = tl.expand_dims(rows.query, AXIS), tl.expand_dims(rows.position, AXIS)
    head, inside = tl.expand_dims(rows.head, AXIS), tl.expand_dims(rows.inside, AXIS)
    return RowTile(query, position, head, inside, slope, bias)


@triton.jit
def logits(products, rows, j, terms, place, window, factors, F: tl.constexpr, MASKED: tl.constexpr):
    """Logits of a tile, -inf where not seen; where F.folded they still want `factors.logit`.

    MASKED: whether some of the tile may lie outside of the window or beyond the last key.
    """
    if F.softcap:
        s = tanh(products * factors.inner) * factors.outer
    elif F.folded:
        s = products
    else:
        s = products * factors.logit
    if terms.slopes.ptr is not None:
        s -= rows.slope * tl.abs(rows.position - j).to(tl.float32)
    if terms.bias.ptr is not None:
        s = _biased(s, rows, j, terms.bias, place)
    if MASKED:
        s = tl.where(_seen(rows.position, j, place.tk, window, F), s, -float("inf"))
    return s


@triton.jit
def cap_derivative(products, factors):
    """d softcap(t) / dt, of the products that `logits` was given."""
    bent = tanh(products * factors.inner)
    return 1.0 - bent * bent


@triton.jit
def tanh(x):
    """The hyperbolic tangent to about 3e-7, relative: a series near zero, where 1 - 2 / (exp 2x + 1) would cancel."""
    y = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(y * (2.0 * LOG2E)) + 1.0)
    z = x * x
    near = 62.0 / 2835.0 - z * (1382.0 / 155925.0)
    near = 2.0 / 15.0 + z * (-17.0 / 315.0 + z * near)
    near = x + x * z * (-1.0 / 3.0 + z * near)
    return tl.where(y < 0.35, near, tl.where(x < 0, -far, far))


@triton.jit
def _biased(s, rows, j, bias, place):
    inside = rows.inside & (j < place.tk)
    pointers = bias.ptr + rows.bias + j.to(tl.int64) * bias.key
    if bias.ptr.dtype.element_ty == tl.int1:
        return tl.where(tl.load(pointers, mask=inside, other=False), s, -float("inf"))
    else:
        return s + tl.load(pointers, mask=inside, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def _seen(position, j, tk, window, F: tl.constexpr):
    inside = j < tk
    if F.left:
        inside = inside & (j >= position - window.left)
    if F.right:
        inside = inside & (j <= position + window.right)
    return inside
