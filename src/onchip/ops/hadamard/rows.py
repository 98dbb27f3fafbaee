"""A tensor's rows as the kernels walk them."""

from torch import Tensor


def in_four_dimensions(x: Tensor) -> Tensor:
    """`(a, b, c, n)`, a view where there is one: contiguous rows all in one dimension, others in at least three."""
    if x.is_contiguous():
        return x.view(1, 1, -1, x.shape[-1])
    if x.ndim > 4:
        return x.flatten(0, x.ndim - 4)
    return x[(None,) * (4 - x.ndim)]
