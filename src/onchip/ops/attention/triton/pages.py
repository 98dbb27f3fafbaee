"""Where the keys of a sequence lie: one after another, or in the pages of a cache."""

import triton
import triton.language as tl


@triton.jit
def find(sequences, place, j, inside):
    """(batch, time) of the keys j of a sequence, as `tiles.offsets` takes them; of a key not `inside`, of any page."""
    key = place.k_start + j
    if sequences.table is None:
        return place.b, key
    else:
        line = sequences.table + place.b.to(tl.int64) * sequences.line
        return tl.load(line + key // sequences.page_size, mask=inside, other=0), key % sequences.page_size
