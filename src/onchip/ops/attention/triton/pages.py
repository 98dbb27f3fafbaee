"""Where the keys of a sequence lie: one after another, or in the pages of a cache."""

import triton
import triton.language as tl


@triton.jit
def find(place, j, inside):
    """(batch, time) of the keys j of a sequence, as `tiles.offsets` takes them; of a key not `inside`, of any page."""
    key = place.k_start + j
    if place.table is None:
        return place.b, key
    else:
        page = tl.load(place.table + key // place.page_size, mask=inside, other=0)
        return page, key % place.page_size
