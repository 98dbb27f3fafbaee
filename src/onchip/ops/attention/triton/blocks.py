"""Tile shapes and launch options per architecture: a short table with reasons, not a search at the first call.

The shapes are the largest that neither spill registers nor outgrow the shared memory; tests/test_budgets.py holds them
to that. None has been timed on a GPU yet. `onchip tune attention` times the neighbours of each entry on the GPU at hand
and prints the table for it.
"""

from typing import Literal, NamedTuple

Pass = Literal["forward", "decode", "keys", "queries", "bias"]


class Blocks(NamedTuple):
    """Rows and keys of a tile, warps of a program, and how many tiles are loaded ahead."""

    rows: int
    keys: int
    warps: int
    stages: int


# By pass, then by the bytes of a head (the larger of q's and v's, padded): the first column that is wide enough.
WIDTHS = (128, 256, 512, 1024)
_Table = dict[Pass, tuple[Blocks, Blocks, Blocks, Blocks]]

# 227 KB of shared memory, wgmma: 128 rows are two warpgroups of 64. Keys are loaded two tiles ahead where they fit.
_SM_90: _Table = {
    "forward": (Blocks(128, 128, 8, 3), Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 32, 8, 1)),
    "decode": (Blocks(16, 128, 4, 4), Blocks(16, 128, 4, 3), Blocks(16, 64, 4, 3), Blocks(16, 32, 4, 2)),
    "keys": (Blocks(64, 128, 8, 2), Blocks(64, 128, 8, 2), Blocks(32, 64, 8, 1), Blocks(16, 32, 4, 1)),
    "queries": (Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 16, 4, 1)),
    "bias": (Blocks(64, 64, 4, 1), Blocks(64, 64, 4, 1), Blocks(64, 32, 4, 1), Blocks(32, 16, 4, 1)),
}
# 163 KB, mma: accumulators are in registers of 4 or 8 warps, so keys come in tiles of half the size.
_SM_80: _Table = {
    "forward": (Blocks(128, 64, 4, 3), Blocks(128, 64, 8, 3), Blocks(64, 32, 4, 2), Blocks(32, 16, 4, 1)),
    "decode": (Blocks(16, 128, 4, 3), Blocks(16, 128, 4, 2), Blocks(16, 64, 4, 2), Blocks(16, 16, 4, 2)),
    "keys": (Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 2), Blocks(32, 32, 4, 1), Blocks(16, 16, 4, 1)),
    "queries": (Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1), Blocks(16, 16, 4, 1)),
    "bias": (Blocks(64, 32, 4, 1), Blocks(64, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(16, 16, 4, 1)),
}
# 64 KB, wavefronts of 64 lanes with 512 registers: K and V pass through registers, one tile at a time.
_GFX9: _Table = {
    "forward": (Blocks(128, 64, 4, 1), Blocks(128, 64, 4, 1), Blocks(64, 32, 4, 1), Blocks(32, 16, 4, 1)),
    "decode": (Blocks(16, 64, 4, 1), Blocks(16, 64, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 16, 4, 1)),
    "keys": (Blocks(32, 64, 4, 1), Blocks(32, 64, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 16, 4, 1)),
    "queries": (Blocks(64, 32, 4, 1), Blocks(64, 32, 4, 1), Blocks(32, 16, 4, 1), Blocks(16, 16, 4, 1)),
    "bias": (Blocks(64, 32, 4, 1), Blocks(64, 32, 4, 1), Blocks(32, 16, 4, 1), Blocks(16, 16, 4, 1)),
}
_INTERPRETER = Blocks(32, 64, 1, 1)  # several tiles over the few rows that a test can afford


def blocks(architecture: str, of: Pass, head_bytes: int) -> Blocks:
    """The tile for a pass of a call whose padded head is this wide.

    >>> blocks("sm_90", "forward", 128 * 2)
    Blocks(rows=128, keys=128, warps=8, stages=2)
    """
    if architecture == "interpreter":
        return _INTERPRETER
    if architecture.startswith("gfx"):
        table = _GFX9
    else:
        table = _SM_90 if architecture in ("sm_90", "sm_100", "sm_103") else _SM_80
    column = next(n for n, width in enumerate(WIDTHS) if head_bytes <= width)
    return table[of][column]
