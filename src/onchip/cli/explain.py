"""`onchip explain`: which implementation would serve a call, and why not the others."""

from typing import Annotated, Any

import typer

from onchip.bench.cases import Dtype
from onchip.cli.errors import Failure
from onchip.cli.values import integers, reach

explain = typer.Typer(
    name="explain",
    help="Say which implementation of an operation serves a call, and why not the others. Computes nothing.",
    no_args_is_help=True,
)


@explain.callback()
def _group() -> None:
    pass


@explain.command()
def attention(
    shape: Annotated[str, typer.Option(metavar="B,T,H,D", help="Shape of q: batch, queries, heads, head dim.")],
    kv_shape: Annotated[
        str | None, typer.Option(metavar="B,T,H,D", help="Shape of k, where it differs: batch, keys, heads, head dim.")
    ] = None,
    v_dim: Annotated[int | None, typer.Option(min=1, help="Head dim of v, where it differs from k's.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of q, k and v.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; it need not be in this machine.")] = "cpu",
    causal: Annotated[bool, typer.Option("--causal", help="No query sees a later key.")] = False,
    window: Annotated[
        str | None, typer.Option(metavar="LEFT,RIGHT", help="How many keys to each side a query sees; - for all.")
    ] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="A row has the same bits in a prefill and a step.")
    ] = False,
    backend: Annotated[str | None, typer.Option(help="Ask for one implementation, as backend= does.")] = None,
) -> None:
    """Say which implementation of attention serves a call, and why not the others.

    The call is described by its shapes, dtype and device. Nothing is computed and no tensor is allocated.

    For example: `onchip explain attention --shape 1,8192,32,128 --kv-shape 1,8192,8,128 --dtype bfloat16 --causal`
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    import onchip

    q_shape = integers("--shape", shape, count=4)
    k_shape = integers("--kv-shape", kv_shape, count=4) if kv_shape else q_shape
    v_shape = [*k_shape[:3], v_dim or k_shape[3]]
    try:
        place = torch.device(device)
    except RuntimeError:
        raise Failure(f"--device must be cpu, cuda or cuda:N, got {device!r}", exit_code=2) from None
    with FakeTensorMode():
        q, k, v = (torch.empty(x, dtype=getattr(torch, dtype), device=place) for x in (q_shape, k_shape, v_shape))
    mask: dict[str, Any] = {"causal": causal, "window": reach("--window", window)}
    explanation = onchip.explain(onchip.attention, q, k, v, **mask, batch_invariant=batch_invariant, backend=backend)
    print(explanation)
    if explanation.chosen is None:
        raise typer.Exit(1)
