"""onchip.attention in the place of PyTorch's scaled_dot_product_attention, and what that place then gains.

python examples/drop_in.py
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import onchip


class SelfAttention(nn.Module):
    """Multi-head self-attention around any function of q, k and v, each (batch, heads, time, head_dim)."""

    def __init__(self, d_model: int, heads: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.heads, self.attend = heads, attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # onchip's layout is (batch, time, heads, head_dim). The transposes are views: nothing is copied.
    return onchip.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True).transpose(1, 2)


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return onchip.attention(q, k, v, causal=True, window=(31, None)).transpose(1, 2)


def main() -> None:
    torch.manual_seed(0)
    module = SelfAttention(d_model=128, heads=4, attend=theirs)
    x = torch.randn(2, 300, 128)

    def outcome(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        module.attend = attend
        module.zero_grad()
        y = module(x)
        y.square().mean().backward()
        return [y.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]

    pairs = zip(outcome(theirs), outcome(ours), strict=True)
    difference = max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)
    print(f"largest difference of the output and the gradients: {difference:.0e} of the largest value")

    module.attend = windowed  # each token now sees itself and the 31 before it; nothing of size T×T is made
    changed = x.clone()
    changed[:, 0] += 1
    last_seen = (module(changed) - module(x)).abs().amax(dim=(0, 2)).nonzero().max().item()
    print(f"with a window of 32, token 0 reaches as far as token {last_seen}")

    # Documents of different lengths, packed one after the other instead of padded: none attends across a border.
    q, k, v = torch.randn(3, 300, 4, 32).unbind(0)
    starts = torch.tensor([0, 17, 217, 300])
    packed = onchip.attention(q, k, v, causal=True, cu_seqlens_q=starts)
    alone = onchip.attention(q[None, 17:217], k[None, 17:217], v[None, 17:217], causal=True)[0]
    print(f"a packed document equals the document alone: {torch.equal(packed[17:217], alone)}")


if __name__ == "__main__":
    main()
