"""Tile shapes and launch options per architecture: a short table with reasons, not a search at the first call.

A shape is the largest found that spills no registers and fits the shared memory, by compiling for the architecture;
tests/test_budgets.py holds the kernels of common calls to that. None has been timed on a GPU yet: `onchip tune
attention` times the neighbours of each entry on the GPU at hand and prints the table for it.
"""

from typing import Literal, NamedTuple

Pass = Literal["forward", "decode", "keys", "queries", "bias"]


class Blocks(NamedTuple):
    """Rows and keys of a tile, warps of a program, and how many tiles are loaded ahead."""

    rows: int
    keys: int
    warps: int
    stages: int


# Of a pass, by the head dim: the first column that is wide enough. The last is for logits with terms at head dim 256.
HEAD_DIMS = (64, 128, 256, 512)
_Table = dict[Pass, tuple[Blocks, Blocks, Blocks, Blocks]]

# 227 KB of shared memory; wgmma wants 64 rows for each of two warpgroups. The gradients of keys and values hold two
# accumulators and both operands in registers: few rows at a time, at head dim 256 too few for wgmma.
_SM_90: _Table = {
    "forward": (Blocks(128, 128, 8, 3), Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 32, 8, 1)),
    "decode": (Blocks(16, 128, 4, 4), Blocks(16, 128, 4, 3), Blocks(16, 64, 4, 3), Blocks(16, 32, 4, 2)),
    "keys": (Blocks(64, 128, 8, 2), Blocks(32, 128, 8, 2), Blocks(32, 32, 8, 1), Blocks(16, 32, 4, 1)),
    "queries": (Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 16, 4, 1)),
    "bias": (Blocks(64, 64, 4, 1), Blocks(64, 64, 4, 1), Blocks(64, 32, 4, 1), Blocks(32, 16, 4, 1)),
}
# 163 KB; mma keeps every operand in registers: half the keys.
_SM_80: _Table = {
    "forward": (Blocks(128, 64, 4, 3), Blocks(128, 64, 8, 3), Blocks(64, 64, 8, 2), Blocks(32, 32, 8, 1)),
    "decode": (Blocks(16, 128, 4, 3), Blocks(16, 128, 4, 2), Blocks(16, 64, 4, 2), Blocks(16, 32, 4, 2)),
    "keys": (Blocks(32, 128, 8, 2), Blocks(32, 64, 8, 2), Blocks(32, 64, 8, 1), Blocks(16, 32, 4, 1)),
    "queries": (Blocks(64, 64, 4, 2), Blocks(64, 64, 8, 2), Blocks(32, 32, 4, 1), Blocks(16, 16, 4, 1)),
    "bias": (Blocks(64, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(16, 16, 4, 1)),
}
# 64 KB, and 512 registers for each of a wavefront's 64 lanes: one tile at a time passes through them.
_GFX9: _Table = {
    "forward": (Blocks(128, 64, 4, 1), Blocks(128, 64, 4, 1), Blocks(64, 32, 4, 1), Blocks(32, 16, 4, 1)),
    "decode": (Blocks(16, 64, 4, 1), Blocks(16, 64, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 16, 4, 1)),
    "keys": (Blocks(32, 64, 4, 1), Blocks(32, 64, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 16, 4, 1)),
    "queries": (Blocks(64, 32, 4, 1), Blocks(64, 32, 4, 1), Blocks(32, 16, 4, 1), Blocks(16, 16, 4, 1)),
    "bias": (Blocks(64, 32, 4, 1), Blocks(64, 32, 4, 1), Blocks(32, 16, 4, 1), Blocks(16, 16, 4, 1)),
}
# Exact products run on the ordinary units, which hold what they multiply in registers, unpacked.
_FLOAT32: _Table = {
    "forward": (Blocks(32, 32, 4, 2), Blocks(16, 32, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
    "decode": (Blocks(16, 32, 4, 2), Blocks(16, 32, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
    "keys": (Blocks(32, 32, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
    "queries": (Blocks(32, 32, 4, 1), Blocks(32, 16, 8, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
    "bias": (Blocks(32, 32, 4, 1), Blocks(32, 16, 8, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
}
_INTERPRETER = Blocks(32, 64, 1, 1)  # several tiles over the few rows that a test can afford


def blocks(architecture: str, of: Pass, head_dim: int, itemsize: int, *, terms: bool) -> Blocks:
    """The tile for a pass over heads of this dim and elements of this size.

    `terms`: whether logits are more than scaled products, or hidden or dropped one by one. That takes registers, so the
    tile is that of heads twice as wide; the bias's gradient has it in its own table already. So is the tile of heads of
    256 where there are 99 KB of shared memory and not 163.

    >>> blocks("sm_90", "forward", 128, 2, terms=False)
    Blocks(rows=128, keys=128, warps=8, stages=2)
    """
    if architecture == "interpreter":
        return _INTERPRETER
    if itemsize == 4:
        table = _FLOAT32
    elif architecture.startswith("gfx"):
        table = _GFX9
    else:
        table = _SM_90 if architecture in ("sm_90", "sm_100", "sm_103") else _SM_80
    cramped = table is _SM_80 and head_dim > 128 and architecture not in ("sm_80", "sm_87")
    column = next(n for n, dim in enumerate(HEAD_DIMS) if head_dim <= dim)
    return table[of][min(column + ((terms and of != "bias") or cramped), len(HEAD_DIMS) - 1)]
