"""`onchip explain`: which implementation would serve a call, and why not the others."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onchip.bench.cases import Dtype
from onchip.cli.errors import Failure
from onchip.cli.values import integers, reach

if TYPE_CHECKING:
    from torch import Tensor

explain = typer.Typer(
    name="explain",
    help="Say which implementation of an operation serves a call, and why not the others. Computes nothing.",
    no_args_is_help=True,
)

_Dtype = Annotated[Dtype, typer.Option(help="Of the inputs.")]
_Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; it need not be in this machine.")]
_Backend = Annotated[str | None, typer.Option(help="Ask for one implementation, as backend= does.")]


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
    dtype: _Dtype = "float32",
    device: _Device = "cpu",
    causal: Annotated[bool, typer.Option("--causal", help="No query sees a later key.")] = False,
    window: Annotated[
        str | None, typer.Option(metavar="LEFT,RIGHT", help="How many keys to each side a query sees; - for all.")
    ] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="A row has the same bits in a prefill and a step.")
    ] = False,
    cache: Annotated[
        bool, typer.Option("--cache", help="Over a cache, as attention_with_cache: keys are its capacity or pages.")
    ] = False,
    backend: _Backend = None,
) -> None:
    """Say which implementation of attention serves a call, and why not the others.

    The call is described by its shapes, dtype and device. Nothing is computed and no tensor is allocated. Biases,
    sinks, block masks, dropout and packed sequences change nothing: whoever serves a call serves them too.

    For example: `onchip explain attention --shape 1,8192,32,128 --kv-shape 1,8192,8,128 --dtype bfloat16 --causal`
    """
    q_shape = integers("--shape", shape, count=4)
    k_shape = integers("--kv-shape", kv_shape, count=4) if kv_shape else q_shape
    v_shape = [*k_shape[:3], v_dim or k_shape[3]]
    options = {"causal": causal, "window": reach("--window", window), "batch_invariant": batch_invariant}
    function = "attention_with_cache" if cache else "attention"
    lengths = {"cache_seqlens": q_shape[:1]} if cache else {}
    _show(function, [q_shape, k_shape, v_shape], lengths, options, dtype, device, backend)


@explain.command(name="causal_conv1d")
def causal_conv1d(
    shape: Annotated[str, typer.Option(metavar="B,T,D", help="Shape of x: batch, time, channels.")],
    width: Annotated[int, typer.Option(min=1, help="Taps of each filter.")] = 4,
    dtype: _Dtype = "float32",
    device: _Device = "cpu",
    backend: _Backend = None,
) -> None:
    """The same of the short causal convolution; for example `onchip explain causal_conv1d --shape 1,2048,1024`."""
    x = integers("--shape", shape, count=3)
    _show("causal_conv1d", [x, [x[2], width]], {}, {}, dtype, device, backend)


@explain.command(name="selective_scan")
def selective_scan(
    shape: Annotated[str, typer.Option(metavar="B,T,D", help="Shape of x: batch, time, channels.")],
    d_state: Annotated[int, typer.Option(min=1, help="Numbers of a channel's state.")] = 16,
    groups: Annotated[int, typer.Option(min=1, help="Groups of channels that share B and C.")] = 1,
    dtype: _Dtype = "float32",
    device: _Device = "cpu",
    backend: _Backend = None,
) -> None:
    """The same of Mamba's scan; for example `onchip explain selective_scan --shape 1,2048,512`."""
    x = integers("--shape", shape, count=3)
    B = [*x[:2], groups, d_state]
    _show("selective_scan", [x, x, [x[2], d_state], B, B], {}, {}, dtype, device, backend)


@explain.command()
def ssd(
    shape: Annotated[str, typer.Option(metavar="B,T,H,P", help="Shape of x: batch, time, heads, head dim.")],
    d_state: Annotated[int, typer.Option(min=1, help="Numbers of the state for each of a head's features.")] = 128,
    groups: Annotated[int, typer.Option(min=1, help="Groups of heads that share B and C.")] = 1,
    dtype: _Dtype = "float32",
    device: _Device = "cpu",
    backend: _Backend = None,
) -> None:
    """The same of Mamba-2's; for example `onchip explain ssd --shape 1,2048,8,64`."""
    x = integers("--shape", shape, count=4)
    B = [*x[:2], groups, d_state]
    _show("ssd", [x, x[:3], [x[2]], B, B], {}, {}, dtype, device, backend)


def _show(
    name: str,
    shapes: Sequence[Sequence[int]],
    lengths: Mapping[str, Sequence[int]],
    options: Mapping[str, Any],
    dtype: str,
    device: str,
    backend: str | None,
) -> None:
    """Explain a call with inputs of these shapes, and integers of those `lengths`."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    import onchip

    try:
        place = torch.device(device)
    except RuntimeError:
        raise Failure(f"--device must be cpu, cuda or cuda:N, got {device!r}", exit_code=2) from None
    with FakeTensorMode():
        inputs: list[Tensor] = [torch.empty(list(x), dtype=getattr(torch, dtype), device=place) for x in shapes]
        counts = {key: torch.empty(list(x), dtype=torch.int32, device=place) for key, x in lengths.items()}
    function: Callable[..., Any] = getattr(onchip, name)
    explanation = onchip.explain(function, *inputs, **counts, **options, backend=backend)
    print(explanation)
    if explanation.chosen is None:
        raise typer.Exit(1)
