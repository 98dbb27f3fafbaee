"""FP8 attention a second time, in float64 and without a loop over keys, from e4m3's definition and nothing else."""

import math

import torch
from torch import Tensor

# Every number of e4m3 from 0 up: code 8e + m is (1 + m/8)·2^(e-7), or m/8·2^-6 where e is 0. Code 127 is NaN.
NUMBERS = torch.tensor(
    [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127],
    dtype=torch.float64,
)


def e4m3(x: Tensor) -> Tensor:
    """The nearest number of e4m3 to each of `x`, in float64; of two as near the one with an even code."""
    size = x.double().abs().clamp(max=448.0)
    above = torch.searchsorted(NUMBERS, size).clamp(max=126)
    below = (above - 1).clamp(min=0)
    up, down = NUMBERS[above] - size, size - NUMBERS[below]
    take_above = (up < down) | ((up == down) & (above % 2 == 0))
    return torch.where(take_above, NUMBERS[above], NUMBERS[below]).copysign(x.double())


def attention(
    q: tuple[Tensor, Tensor],
    k: tuple[Tensor, Tensor],
    v: tuple[Tensor, Tensor],
    scale: float,
    *,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
    block: int = 128,
    logit_error: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """`out`, `lse`, and how far arithmetic may lead `out` astray, of a sequence of (values, scales): (T, H, D), (T, H).

    `logit_error` is that of the products' sums. A probability next to the middle of two numbers of e4m3 may be rounded
    to either: what that changes is the third.
    """
    group = q[0].shape[1] // k[0].shape[1]
    wide = [values.double() * scales.double()[..., None] for values, scales in (q, k, v)]
    wide[1:] = (x.repeat_interleave(group, 1) for x in wide[1:])
    s = torch.einsum("ihd,jhd->hij", wide[0], wide[1]) * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    tq, tk = s.shape[1:]
    distance = torch.arange(tk) - torch.arange(tq)[:, None] - (tk - tq)
    hidden = ((distance < -left) & (left >= 0)) | ((distance > right) & (right >= 0))
    s = s.masked_fill(hidden, -math.inf)
    lse = s.logsumexp(-1)
    padded = torch.nn.functional.pad(s, (0, -tk % block), value=-math.inf).unflatten(-1, (-1, block))
    running = padded.amax(-1).cummax(-1).values.repeat_interleave(block, -1)[..., :tk]
    base = running.masked_fill(running == -math.inf, 0.0)
    p = 256 * (s - base).exp()
    weight = (base - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp() / 256
    either = (e4m3(p * (1 + logit_error)) - e4m3(p * (1 - logit_error))).abs()
    out, astray = (
        torch.einsum("hij,jhd->ihd", x * weight, y) for x, y in ((e4m3(p), wide[2]), (either, wide[2].abs()))
    )
    terms = torch.einsum("hij,jhd->ihd", e4m3(p) * weight, wide[2].abs())
    return out, lse, astray + logit_error * terms
