"""What a call to the selective scan must satisfy, and the sentences that say so when it does not."""

from torch import Tensor

from onchip.ops._sequence import STATE_DTYPES, check_boundaries, check_tensor
from onchip.ops.attention.checks import check_flag


def check_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """The arguments of `selective_scan` fit each other."""
    leading = ("batch", "time") if cu_seqlens is None else ("total",)
    check_tensor("x", x, (*leading, "channels"), x, any_float=True)
    check_sizes(x, A)
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, x)
    check_tokens({"dt": dt, "z": z}, {"B": B, "C": C}, x, A)
    check_channels({"D": D, "dt_bias": dt_bias}, dt_softplus, x)
    if initial_state is not None:
        count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_state("initial_state", initial_state, count, x, A)


def check_step(
    x_t: Tensor,
    state: Tensor,
    dt_t: Tensor,
    A: Tensor,
    B_t: Tensor,
    C_t: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    out_state: Tensor | None,
) -> None:
    """The arguments of `selective_scan_step` fit each other."""
    check_tensor("x_t", x_t, ("batch", "channels"), x_t, any_float=True)
    check_sizes(x_t, A)
    check_tokens({"dt_t": dt_t, "z": z}, {"B_t": B_t, "C_t": C_t}, x_t, A)
    check_channels({"D": D, "dt_bias": dt_bias}, dt_softplus, x_t)
    check_state("state", state, x_t.shape[0], x_t, A)
    if out_state is not None:
        check_state("out_state", out_state, x_t.shape[0], x_t, A)


def check_sizes(x: Tensor, A: Tensor) -> None:
    """A has a row for each of x's channels, and there is something to scan."""
    check_tensor("A", A, (x.shape[-1], "d_state"), x, any_float=True)
    if 0 in A.shape:
        raise ValueError(f"A must have at least one channel and one state, got shape {tuple(A.shape)}")


def check_tokens(per_channel: dict[str, Tensor | None], per_group: dict[str, Tensor], x: Tensor, A: Tensor) -> None:
    """What every token brings fits x; names are those of the arguments. dt, the first, is not optional."""
    for i, (name, u) in enumerate(per_channel.items()):
        if u is not None or i == 0:
            check_tensor(name, u, tuple(x.shape), x, any_float=True)
    groups: int | None = None
    for name, u in per_group.items():
        check_tensor(name, u, (*x.shape[:-1], "groups" if groups is None else groups, A.shape[1]), x, any_float=True)
        groups = u.shape[-2]
        if groups == 0 or x.shape[-1] % groups != 0:
            raise ValueError(f"{name}'s groups must divide x's {x.shape[-1]} channels, got {groups} groups")


def check_channels(parameters: dict[str, Tensor | None], dt_softplus: bool, x: Tensor) -> None:
    """What every channel has for all tokens fits x."""
    for name, u in parameters.items():
        if u is not None:
            check_tensor(name, u, (x.shape[-1],), x, any_float=True)
    check_flag("dt_softplus", dt_softplus)


def check_state(name: str, state: Tensor, count: int, x: Tensor, A: Tensor) -> None:
    """A state of `count` sequences, in the type it is carried in or in x's."""
    check_tensor(name, state, (count, *A.shape), x, any_float=True)
    allowed = (STATE_DTYPES[x.dtype], x.dtype)
    if state.dtype not in allowed:
        names = " or ".join(map(str, dict.fromkeys(allowed)))
        raise TypeError(f"{name} must be {names} where x is {x.dtype}, got {state.dtype}")
