"""Which probabilities of a tile are dropped: Philox of where they stand, as the reference defines it.

`tl.philox` is the function that was published, and one call of it serves four keys: 5 wide products and 10 operations
on bits for each probability, less what does not vary along a tile. It has been compiled and interpreted, and not run on
a GPU.
"""

import triton
import triton.language as tl


@triton.jit
def _unwrapped(word):
    return (word >> 1) & 0xFFFFFFFF


@triton.jit
def kept(first, rows, place, factors, KEYS: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """True where a probability stays, of the rows and of KEYS keys from `first`, a multiple of four.

    KEYS_FIRST: the tile is (keys, rows), and `rows` has the shape (1, rows).
    """
    seed = (_unwrapped(factors.seed_high) << 32) | _unwrapped(factors.seed_low)
    threshold = _unwrapped(factors.threshold).to(tl.uint32)
    fours = first // 4 + tl.arange(0, KEYS // 4)
    fours = tl.expand_dims(fours, 1 if KEYS_FIRST else 0)
    w0, w1, w2, w3 = tl.philox(seed, fours, rows.query, rows.head, place.b)
    even, odd = tl.join(w0 >= threshold, w2 >= threshold), tl.join(w1 >= threshold, w3 >= threshold)
    each = tl.join(even, odd)  # the last two dimensions count a four's keys
    if KEYS_FIRST:
        return tl.permute(each, (0, 2, 3, 1)).reshape((KEYS, rows.query.shape[1]))
    else:
        return each.reshape((rows.query.shape[0], KEYS))
