"""The softmax of a row whose logits come a tile at a time (Milakov and Gimelshein, arXiv 1805.02867)."""

import triton
import triton.language as tl

from onchip.ops.attention.triton.scores import LOG2E

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def begin(sinks, head, counted, ROWS: tl.constexpr):
    """(maximum, sum) before the first key: nothing, or the head's sink where it is `counted` here."""
    if sinks is None:
        return tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    else:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        sink = tl.where(counted, sink, -float("inf"))
        return sink, tl.where(sink == -float("inf"), 0.0, 1.0)


@triton.jit
def step(maximum, total, s, factor):
    """One more tile of logits: its unnormalised probabilities, the new (maximum, sum), and what the old sums shrink by.

    `factor`, positive, still multiplies the logits: it waits here so that one multiply-add makes the exponent.
    """
    grown = tl.maximum(maximum, tl.max(s, 1) * factor)
    base = tl.where(grown == -float("inf"), 0.0, grown)  # a row that has seen nothing yet
    p = tl.exp2(s * factor - base[:, None])
    shrink = tl.exp2(maximum - base)
    return p, grown, total * shrink + tl.sum(p, 1), shrink


@triton.jit
def join(maximum, total, weighted, logarithm, part):
    """One more part of the keys: its log-sum-exp in units of log 2, and its output."""
    share, maximum, total, shrink = step(maximum, total, logarithm[:, None], 1.0)
    return maximum, total, weighted * shrink[:, None] + share * part


@triton.jit
def finish(maximum, total):
    """What the weighted sum of values is multiplied by, and the log-sum-exp in units of log 2."""
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    return tl.where(empty, 0.0, 1.0 / total), tl.where(empty, -float("inf"), maximum + tl.log2(total))
