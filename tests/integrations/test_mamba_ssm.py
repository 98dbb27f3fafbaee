"""mamba_ssm's functions against their definitions, written out here as loops in mamba_ssm's own layouts."""

import inspect
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from onchip.integrations.mamba_ssm.layernorm_gated import RMSNorm, rmsnorm_fn
from onchip.integrations.mamba_ssm.selective_scan_interface import mamba_inner_fn, selective_scan_fn
from onchip.integrations.mamba_ssm.selective_state_update import selective_state_update
from onchip.integrations.mamba_ssm.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

BATCH, LENGTH, DIM, N = 2, 21, 6, 4


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def positive(*shape, seed=0):
    return normal(*shape, seed=seed).abs() + 0.1


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def scan(u, delta, A, B, C, D=None, z=None, bias=None, softplus=False, state=None, seq_idx=None):
    """The recurrence, one token and one channel at a time: u (b, d, l); B, C (b, d, n, l); state (b, d, n)."""
    delta = delta if bias is None else delta + bias[:, None]
    delta = F.softplus(delta) if softplus else delta
    h = u.new_zeros(u.shape[0], *A.shape) if state is None else state
    outs = []
    for t in range(u.shape[2]):
        if seq_idx is not None and t > 0:
            h = h * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None]
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[..., t]
        outs.append((h * C[..., t]).sum(-1))
    y = torch.stack(outs, -1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


def per_channel(B):
    """Any of the three forms of B as (b, d, n, l)."""
    if B.ndim == 2:
        return B[None, :, :, None].expand(BATCH, -1, -1, LENGTH)
    B = B[:, None] if B.ndim == 3 else B
    return B.repeat_interleave(DIM // B.shape[1], dim=1)


B_FORMS = {"constant": (DIM, N), "varying": (BATCH, N, LENGTH), "groups": (BATCH, 3, N, LENGTH)}


@pytest.mark.parametrize("b_form", B_FORMS)
@pytest.mark.parametrize("c_form", B_FORMS)
@pytest.mark.parametrize("options", [False, True], ids=["plain", "all options"])
def test_selective_scan(b_form, c_form, options):
    u, delta = normal(BATCH, DIM, LENGTH), positive(BATCH, DIM, LENGTH)
    A, B, C = -positive(DIM, N), normal(*B_FORMS[b_form]), normal(*B_FORMS[c_form], seed=1)
    D, z, bias = (normal(DIM), normal(BATCH, DIM, LENGTH, seed=2), normal(DIM, seed=3)) if options else (None,) * 3
    inputs = [x.requires_grad_() for x in (u, delta, A, B, C, D, z, bias) if x is not None]
    expected, state = scan(u, delta, A, per_channel(B), per_channel(C), D, z, bias, options)
    out, last = selective_scan_fn(u, delta, A, B, C, D, z, bias, options, return_last_state=True)
    close(out, expected)
    close(last, state)
    weights = normal(*out.shape, seed=4), normal(*last.shape, seed=5)
    gradients = torch.autograd.grad((out * weights[0]).sum() + (last * weights[1]).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights[0]).sum() + (state * weights[1]).sum(), inputs)
    for got, want in zip(gradients, wanted, strict=True):
        close(got, want)


def test_selective_scan_refuses_what_it_has_not():
    u, B = normal(BATCH, DIM, LENGTH), normal(BATCH, N, LENGTH)
    for name in ("u", "delta", "A", "B", "C", "z"):
        tensors = dict(zip(("u", "delta", "A", "B", "C"), (u, u, -positive(DIM, N), B, B), strict=True))
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
            selective_scan_fn(**{**tensors, name: [1]})
    with pytest.raises(TypeError, match=r"A must be real, got torch\.complex128"):
        selective_scan_fn(u, u, -positive(DIM, N).to(torch.complex128), B, B)
    with pytest.raises(ValueError, match=r"B must be \(dim, d_state\), .* got \(4,\)"):
        selective_scan_fn(u, u, -positive(DIM, N), normal(N), B)
    with pytest.raises(ValueError, match="C's groups must divide u's 6 channels, got 0"):
        selective_scan_fn(u, u, -positive(DIM, N), B, normal(BATCH, 0, N, LENGTH))
    with pytest.raises(ValueError, match=r"B must have shape \(6, d_state\), got \(3, 4\)"):  # not three groups
        selective_scan_fn(u, u, -positive(DIM, N), normal(3, N), B)


@pytest.mark.parametrize("norms", [False, True], ids=["mamba", "falcon mamba"])
@pytest.mark.parametrize("given", [False, True], ids=["projected", "B and C given"])
def test_mamba_inner(norms, given):
    rank, d_model, width = 3, 5, 4
    xz, conv, conv_bias = normal(BATCH, 2 * DIM, LENGTH), normal(DIM, 1, width), normal(DIM)
    delta_proj, out_proj, out_bias = normal(DIM, rank), normal(d_model, DIM), normal(d_model)
    A, D, delta_bias = -positive(DIM, N), normal(DIM, seed=1), normal(DIM, seed=2)
    B, C = (normal(BATCH, N, LENGTH, seed=3), normal(BATCH, N, LENGTH, seed=4)) if given else (None, None)
    x_proj = normal(rank if given else rank + 2 * N, DIM)
    weights = {"b_rms_weight": normal(N), "c_rms_weight": normal(N, seed=1), "dt_rms_weight": normal(DIM)}
    weights = weights if norms else {}
    biases = {} if given else {"B_proj_bias": normal(N, seed=5), "C_proj_bias": normal(N, seed=6)}
    tensors = (xz, conv, conv_bias, x_proj, delta_proj, out_proj, out_bias, A)
    y = mamba_inner_fn(*tensors, B, C, D, delta_bias=delta_bias, **biases, **weights)

    def rms(x, name):
        return x if not norms else x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[name]

    x, z = xz.chunk(2, dim=1)
    x = F.silu(F.conv1d(F.pad(x, (width - 1, 0)), conv, conv_bias, groups=DIM))
    projected = x.mT @ x_proj.T
    delta = rms(projected[..., :rank] @ delta_proj.T, "dt_rms_weight").mT
    if not given:
        B = (projected[..., rank : rank + N] + biases["B_proj_bias"]).mT
        C = (projected[..., rank + N :] + biases["C_proj_bias"]).mT
    B, C = rms(B.mT, "b_rms_weight").mT, rms(C.mT, "c_rms_weight").mT
    expected, _ = scan(x, delta, A, per_channel(B), per_channel(C), D, z, delta_bias, True)
    close(y, expected.mT @ out_proj.T + out_bias)


def test_mamba_inner_refuses_an_unknown_level():
    with pytest.raises(ValueError, match="checkpoint_lvl must be 0 or 1, got 2"):
        mamba_inner_fn(*[torch.zeros(1)] * 8, checkpoint_lvl=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"B": normal(BATCH, N, LENGTH), "B_proj_bias": normal(N)}, "B_proj_bias must be None where B is given"),
        ({}, r"x_proj_weight must have shape \(11, 6\), got \(7, 6\)"),
        (
            {"B": normal(BATCH, N, LENGTH), "b_rms_weight": normal(3)},
            r"b_rms_weight must have shape \(4,\), got \(3,\)",
        ),
    ],
)
def test_mamba_inner_says_what_does_not_fit(arguments, message):
    rank = 3
    tensors = normal(BATCH, 2 * DIM, LENGTH), normal(DIM, 1, 4), None, normal(rank + N, DIM), normal(DIM, rank)
    with pytest.raises(ValueError, match=message):
        mamba_inner_fn(*tensors, normal(5, DIM), None, -positive(DIM, N), **arguments)


def token(heads, expanded):
    """A token of `selective_state_update`, and its state."""
    shape = (DIM,) if heads is None else (heads, 3)
    each = {"A": (*shape, N), "dt": (BATCH, *shape), "dt_bias": shape}
    if expanded:
        A, dt, bias = -positive(heads), positive(BATCH, heads), normal(heads)
        values = {"A": A[:, None, None], "dt": dt[..., None], "dt_bias": bias[:, None]}
        values = {name: value.expand(each[name]) for name, value in values.items()}
    else:
        values = {"A": -positive(*each["A"]), "dt": positive(*each["dt"]), "dt_bias": normal(*shape)}
    groups = () if heads is None else (2,)
    values |= {"B": normal(BATCH, *groups, N), "C": normal(BATCH, *groups, N, seed=1)}
    values |= {"x": normal(BATCH, *shape), "z": normal(BATCH, *shape, seed=1), "D": normal(*shape, seed=2)}
    return normal(BATCH, *shape, N), values


NAMES = "x", "dt", "A", "B", "C", "D", "z", "dt_bias"


def updated(state, x, dt, A, B, C, D, z, dt_bias):
    dt = F.softplus(dt + dt_bias)
    if state.ndim == 4:
        B, C = (u.repeat_interleave(state.shape[1] // u.shape[1], dim=1)[:, :, None] for u in (B, C))
    else:
        B, C = B[:, None], C[:, None]
    new = torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B
    return ((new * C).sum(-1) + D * x) * F.silu(z), new


@pytest.mark.parametrize(("heads", "expanded"), [(None, False), (4, False), (4, True)])
def test_state_update(heads, expanded):
    state, values = token(heads, expanded)
    expected, new = updated(state, **values)
    y = selective_state_update(state, **values, dt_softplus=True)
    close(y, expected)
    close(state, new)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("heads", "expanded"), [(None, False), (4, False), (4, True)])
@pytest.mark.parametrize("of_state", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_x, of_rest", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_state_update_in_mixed_dtypes(heads, expanded, of_state, of_x, of_rest, gradients, indexed):
    """mamba_ssm computes in float32 and rounds the state to its own dtype, which its Mamba2 takes from its weights."""
    state, values = token(heads, expanded)
    state = state.to(of_state)
    values["x"] = values["x"].to(getattr(torch, of_x))
    values |= {name: values[name].to(getattr(torch, of_rest)) for name in ("B", "C", "z")}
    expected, new = updated(*(u.double() for u in (state, *(values[name] for name in NAMES))))
    values["B"].requires_grad_(gradients)
    options = {"state_batch_indices": torch.arange(BATCH)} if indexed else {}
    y = selective_state_update(state, **values, dt_softplus=True, **options)
    assert (y.dtype, state.dtype) == (getattr(torch, of_x), of_state)
    for got, want in ((y, expected), (state, new)):
        rounding = torch.finfo(got.dtype).eps / 2 * want.abs()
        assert ((got.double() - want).abs() <= rounding + 1e-5).all()


@pytest.mark.parametrize(("heads", "expanded"), [(None, False), (4, True)])
def test_state_update_of_some_rows(heads, expanded):
    _, values = token(heads, expanded)
    state = normal(5, *values["x"].shape[1:], N, seed=7)
    before, rows = state.clone(), torch.tensor([3, 1], dtype=torch.int32)
    expected, new = updated(state[rows.long()], **values)
    close(selective_state_update(state, **values, dt_softplus=True, state_batch_indices=rows), expected)
    close(state[rows.long()], new)
    close(state[[0, 2, 4]], before[[0, 2, 4]])


@pytest.mark.parametrize(("heads", "expanded"), [(None, False), (4, False), (4, True)])
def test_state_update_leaves_padding_alone(heads, expanded):
    _, values = token(heads, expanded)
    state = normal(3, *values["x"].shape[1:], N, seed=7)
    before, expected = state.clone(), selective_state_update(state[1:].clone(), **values)
    y = selective_state_update(state, **values, state_batch_indices=torch.tensor([-1, 2], dtype=torch.int32))
    assert not y[0].any()
    close(y[1], expected[1])
    assert torch.equal(state[:2], before[:2])
    assert not torch.equal(state[2], before[2])


@pytest.mark.parametrize(("heads", "expanded"), [(None, False), (4, False), (4, True)])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("state", lambda u: u.int(), "state must be float64, float32"),
        ("state", lambda u: u[:, 1:], r"state must have shape \(2, .*, d_state\), got"),
        ("A", lambda u: u[..., 1:], r"A must have shape \(.*4\), got \(.*3\)"),
        ("dt", lambda u: u[1:], "dt must have shape"),
        ("dt_bias", lambda u: u[1:], "dt_bias must have shape"),
        ("state_batch_indices", lambda u: torch.tensor([0.0, 1.0]), "must be int32 or int64, got torch.float32"),
        ("x", lambda u: [1.0], "x must be a tensor, got list"),
        ("B", lambda u: None, "B must be a tensor, got NoneType"),
        ("C", lambda u: torch.tensor(1.0), r"C must have dimensions, got shape \(\)"),
        ("state_batch_indices", lambda u: torch.tensor([1]), r"must have shape \(2,\), got \(1,\)"),
    ],
)
def test_state_update_says_what_does_not_fit(heads, expanded, name, change, message):
    state, values = token(heads, expanded)
    arguments = {"state": state, **values}
    arguments[name] = change(arguments.get(name))
    with pytest.raises((ValueError, TypeError), match=message):
        selective_state_update(**arguments)


@pytest.mark.parametrize(("heads", "expanded"), [(None, False), (4, False), (4, True)])
def test_gradients_flow_through_updates(heads, expanded):
    state, values = token(heads, expanded)
    inputs = [state.requires_grad_(), values["x"].requires_grad_(), values["B"].requires_grad_()]
    expected, new = updated(state, **values)
    expected2, _ = updated(new, **values)
    carried = state * 1
    y = selective_state_update(carried, **values, dt_softplus=True)
    y2 = selective_state_update(carried, **values, dt_softplus=True)
    for got, want in zip(
        torch.autograd.grad((y + 2 * y2).sum(), inputs),
        torch.autograd.grad((expected + 2 * expected2).sum(), inputs),
        strict=True,
    ):
        close(got, want)


HEADS, P, GROUPS = 4, 3, 2
STARTS = torch.tensor([[0] * 5 + [1] * 9 + [2] * 7, [3] * 21], dtype=torch.int32)


def chunk_scan(x, dt, A, B, C, D, z, bias, state, seq_idx=None, limit=(0.0, float("inf")), softplus=True):
    """`scan` with heads as channels."""
    dt = (F.softplus(dt + bias) if softplus else dt + bias).clamp(*limit).repeat_interleave(P, 2).mT
    B, C = (u.repeat_interleave(HEADS // GROUPS * P, dim=2).permute(0, 2, 3, 1) for u in (B, C))
    flat = [u.flatten(2).mT for u in (x, z)]
    A, D = A.repeat_interleave(P)[:, None].expand(-1, N), D.expand(HEADS, P).flatten()
    y, state = scan(flat[0], dt, A, B, C, D, flat[1], state=state.flatten(1, 2), seq_idx=seq_idx)
    return y.mT.unflatten(2, (HEADS, P)), state.unflatten(1, (HEADS, P))


def chunk_inputs():
    tokens = BATCH, LENGTH
    return {
        "x": normal(*tokens, HEADS, P),
        "dt": normal(*tokens, HEADS),
        "A": -positive(HEADS),
        "B": normal(*tokens, GROUPS, N),
        "C": normal(*tokens, GROUPS, N, seed=1),
        "D": normal(HEADS, P),
        "z": normal(*tokens, HEADS, P, seed=1),
        "dt_bias": normal(HEADS),
    }


@pytest.mark.parametrize("seq_idx", [None, STARTS], ids=["rows", "seq_idx"])
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.2, 0.9)], ids=["unlimited", "limited"])
def test_chunk_scan(seq_idx, softplus, limit):
    tensors, state = chunk_inputs(), normal(BATCH, HEADS, P, N, seed=3)
    inputs = [u.requires_grad_() for u in (*tensors.values(), state)]
    expected, last = chunk_scan(*tensors.values(), state, seq_idx, limit, softplus)
    out, final = mamba_chunk_scan_combined(
        **tensors,
        chunk_size=8,
        initial_states=state,
        seq_idx=seq_idx,
        dt_softplus=softplus,
        dt_limit=limit,
        return_final_states=True,
    )
    close(out, expected)
    close(final, last)
    wanted = torch.autograd.grad(expected.sin().sum() + last.sin().sum(), inputs)
    for got, want in zip(torch.autograd.grad(out.sin().sum() + final.sin().sum(), inputs), wanted, strict=True):
        close(got, want)


def test_chunk_scan_returns_states_of_sequences():
    tensors = {name: u[:1] if u.shape[0] == BATCH else u for name, u in chunk_inputs().items()}
    cu_seqlens = torch.tensor([0, 5, 14, 21], dtype=torch.int32)
    options = {"chunk_size": 8, "return_varlen_states": True, "dt_softplus": True}
    out, states = mamba_chunk_scan_combined(**tensors, seq_idx=STARTS[:1], cu_seqlens=cu_seqlens, **options)
    for i, (a, b) in enumerate([(0, 5), (5, 14), (14, 21)]):
        piece = {name: u[:, a:b] if u.ndim > 1 and u.shape[1] == LENGTH else u for name, u in tensors.items()}
        one, state = mamba_chunk_scan_combined(**piece, chunk_size=4, dt_softplus=True, return_final_states=True)
        close(out[:, a:b], one)
        close(states[i], state[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"return_varlen_states": True}, "cu_seqlens must be given where return_varlen_states is"),
        ({"cu_seqlens": torch.tensor([0, 21])}, "seq_idx must be given where cu_seqlens is"),
        ({"cu_seqlens": torch.tensor([0, 21]), "seq_idx": STARTS}, "x must have a batch of 1 .* got 2"),
        ({"seq_idx": STARTS[:, 1:]}, r"seq_idx must have shape \(2, 21\), got \(2, 20\)"),
        ({"dt_limit": None}, r"dt_limit must be a pair \(low, high\) of numbers, got None"),
        ({"dt_limit": [1.0], "dt_softplus": True}, r"dt_limit must be a pair \(low, high\) of numbers, got \[1.0\]"),
        ({"dt_limit": 2.5}, r"dt_limit must be a pair \(low, high\) of numbers, got 2.5"),
        ({"x": [1]}, "x must be a tensor, got list"),
        ({"state_dtype": torch.int32}, "state_dtype must be None, float64, float32, .* got torch.int32"),
        ({"state_dtype": "float32"}, "state_dtype must be None, float64, float32, .* got 'float32'"),
    ],
)
def test_chunk_scan_says_what_does_not_fit(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        mamba_chunk_scan_combined(**{**chunk_inputs(), "chunk_size": 8, **arguments})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_states_come_in_the_dtype_that_is_asked_for(dtype):
    tensors = {name: u[:1] if u.shape[0] == BATCH else u for name, u in chunk_inputs().items()}
    options = {"seq_idx": STARTS[:1], "cu_seqlens": torch.tensor([0, 5, 14, 21]), "chunk_size": 8}
    options |= {"return_final_states": True, "return_varlen_states": True}
    out, *states = mamba_chunk_scan_combined(**tensors, **options)
    same, *converted = mamba_chunk_scan_combined(**tensors, **options, state_dtype=dtype)
    assert torch.equal(same, out)
    for state, other in zip(states, converted, strict=True):
        assert torch.equal(other, state.to(dtype)) and other.dtype == dtype


@pytest.mark.parametrize("function", [mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined])
def test_state_dtype_is_the_last_argument(function):
    *_, last = inspect.signature(function).parameters.values()
    assert (last.name, last.default) == ("state_dtype", None)


def test_packed_rows_are_not_mistaken_for_each_other():
    tensors = chunk_inputs()
    tensors["B"], tensors["C"] = (tensors[name].reshape(3, 14, GROUPS, N) for name in ("B", "C"))
    with pytest.raises(ValueError, match=r"B must have shape \(2, 21, groups, state dim\), got \(3, 14"):
        mamba_chunk_scan_combined(**tensors, chunk_size=8, seq_idx=STARTS)


@pytest.mark.parametrize(("rows", "length"), [(2, 0), (0, 21)])
def test_chunk_scan_of_no_tokens(rows, length):
    tensors = {name: u[:rows, :length] if u.shape[:2] == (BATCH, LENGTH) else u for name, u in chunk_inputs().items()}
    state, seq_idx = normal(rows, HEADS, P, N), STARTS[:rows, :length]
    options = {"chunk_size": 8, "seq_idx": seq_idx, "initial_states": state, "return_final_states": True}
    out, final = mamba_chunk_scan_combined(**tensors, **options)
    assert out.shape == tensors["x"].shape
    assert torch.equal(final, state)


def test_boundaries_must_be_where_the_sequences_change():
    tensors = {name: u[:1] if u.shape[0] == BATCH else u for name, u in chunk_inputs().items()}
    with pytest.raises(ValueError, match=r"cu_seqlens must be where seq_idx changes, \[0, 5, 14, 21\], got \[0, 21\]"):
        mamba_chunk_scan_combined(**tensors, chunk_size=8, seq_idx=STARTS[:1], cu_seqlens=torch.tensor([0, 21]))


@pytest.mark.parametrize("seq_idx", [None, STARTS], ids=["rows", "seq_idx"])
@pytest.mark.parametrize("norm", [None, True, False], ids=["gate in the scan", "norm then gate", "gate then norm"])
@pytest.mark.parametrize("d_mlp", [0, 5])
def test_split_conv1d_scan(seq_idx, norm, d_mlp):
    dim, wide = HEADS * P, HEADS * P + 2 * GROUPS * N
    zxbcdt, conv, conv_bias = normal(BATCH, LENGTH, 2 * d_mlp + dim + wide + HEADS), normal(wide, 4), normal(wide)
    bias, A, D, state = normal(HEADS), -positive(HEADS), normal(HEADS, seed=1), normal(BATCH, HEADS, P, N)
    weight, out_weight, out_bias = normal(dim), normal(7, d_mlp + dim), normal(7)
    y, final = mamba_split_conv1d_scan_combined(
        zxbcdt,
        conv,
        conv_bias,
        bias,
        A,
        D,
        8,
        initial_states=state,
        seq_idx=seq_idx,
        return_final_states=True,
        rmsnorm_weight=None if norm is None else weight,
        outproj_weight=out_weight,
        outproj_bias=out_bias,
        headdim=P,
        ngroups=GROUPS,
        norm_before_gate=bool(norm),
        state_dtype=torch.float32,
    )
    gate, up, z, xBC, dt = zxbcdt.split([d_mlp, d_mlp, dim, wide, HEADS], dim=-1)
    pieces = [[(0, LENGTH)]] * 2 if seq_idx is None else [[(0, 5), (5, 14), (14, 21)], [(0, 21)]]
    rows = []
    for row, spans in zip(xBC, pieces, strict=True):
        inputs = [F.pad(row[a:b].T, (3, 0)) for a, b in spans]
        rows.append(torch.cat([F.silu(F.conv1d(u, conv[:, None], conv_bias, groups=wide)) for u in inputs], -1).T)
    x, B, C = torch.stack(rows).split([dim, GROUPS * N, GROUPS * N], dim=-1)
    B, C = (u.unflatten(-1, (GROUPS, N)) for u in (B, C))
    x, gates = x.unflatten(-1, (HEADS, P)), z.unflatten(-1, (HEADS, P))
    open_gate = torch.full_like(gates, 1.2784645427610738)  # where silu is 1
    expected, last = chunk_scan(x, dt, A, B, C, D[:, None], gates if norm is None else open_gate, bias, state, seq_idx)
    expected = expected.flatten(-2)
    if norm is not None:
        before = expected if norm else expected * F.silu(z)
        grouped = before.unflatten(-1, (GROUPS, -1))
        grouped = grouped / (grouped.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        expected = grouped.flatten(-2) * weight * (F.silu(z) if norm else 1)
    expected = torch.cat([F.silu(gate) * up, expected], -1) @ out_weight.T + out_bias
    torch.testing.assert_close(y, expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(final, last.float())


def test_split_conv1d_scan_says_what_does_not_fit():
    tensors = normal(1, 5, 39), normal(20, 4), None, normal(4), -positive(4)
    with pytest.raises(ValueError, match="headdim must be given"):
        mamba_split_conv1d_scan_combined(*tensors, normal(4), 8)
    with pytest.raises(ValueError, match=r"must agree on the sizes .* got \(1, 5, 39\), \(20, 4\) and \(4, 3\)"):
        mamba_split_conv1d_scan_combined(*tensors, normal(4, 3), 8)
    with pytest.raises(ValueError, match=r"headdim must be that of D \(4, 3\), got 4"):
        mamba_split_conv1d_scan_combined(*tensors, normal(4, 3), 8, headdim=4)
    with pytest.raises(ValueError, match="ngroups must be at least 1, got 0"):
        mamba_split_conv1d_scan_combined(*tensors, normal(4, 3), 8, ngroups=0)
    with pytest.raises(ValueError, match="outproj_bias must be None where outproj_weight is"):
        mamba_split_conv1d_scan_combined(*tensors, normal(4, 3), 8, outproj_bias=normal(7))
    with pytest.raises(TypeError, match="D must be a tensor, got list"):
        mamba_split_conv1d_scan_combined(*tensors, [1.0], 8)
    with pytest.raises(ValueError, match=r"zxbcdt must have dimensions, got shape \(\)"):
        mamba_split_conv1d_scan_combined(torch.ones(()), *tensors[1:], normal(4, 3), 8)
    with pytest.raises(TypeError, match="ngroups must be an integer, got float"):
        mamba_split_conv1d_scan_combined(*tensors, normal(4, 3), 8, ngroups=1.0)
    with pytest.raises(TypeError, match="outproj_weight must be a tensor, got list"):
        mamba_split_conv1d_scan_combined(*tensors, normal(4, 3), 8, outproj_weight=[1.0])


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("bias", [None, "bias"])
@pytest.mark.parametrize("gated", [True, False])
def test_norm(before, bias, gated):
    x, weight, group = normal(2, 5, 12), normal(12), 4
    z, bias = normal(2, 5, 12, seed=1) if gated else None, None if bias is None else normal(12, seed=1)
    y = rmsnorm_fn(x, weight, bias, z, 1e-6, group, before)
    inner = x if z is None or before else x * F.silu(z)
    grouped = inner.unflatten(-1, (3, 4))
    expected = (grouped / (grouped.square().mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(-2) * weight
    expected = expected if bias is None else expected + bias
    close(y, expected * F.silu(z) if gated and before else expected)


def test_norm_as_a_module():
    norm = RMSNorm(12, eps=1e-4, group_size=4, norm_before_gate=False, dtype=torch.float64)
    x, z = normal(2, 5, 12), normal(2, 5, 12, seed=1)
    close(norm(x, z), rmsnorm_fn(x, norm.weight, None, z, 1e-4, 4, False))
    assert list(norm.state_dict()) == ["weight"]
    with pytest.raises(ValueError, match="group_size must divide x's 12 features, got 5"):
        rmsnorm_fn(x, norm.weight, None, group_size=5)
    with pytest.raises(ValueError, match=r"weight must have shape \(12,\), got \(4,\)"):
        rmsnorm_fn(x, norm.weight[:4], None, group_size=4)
    with pytest.raises(ValueError, match=r"z must have shape \(2, 5, 12\), got \(5, 12\)"):
        rmsnorm_fn(x, norm.weight, None, z[0])


def test_install():
    from onchip.integrations import mamba_ssm

    code = """
from onchip.integrations import mamba_ssm as ours
ours.install()
import importlib.metadata
import mamba_ssm
import mamba_ssm.ops.triton.ssd_combined as combined
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm
assert importlib.metadata.version("mamba-ssm") == mamba_ssm.__version__ == ours.EMULATED
assert mamba_ssm.ops.triton.ssd_combined is combined
ours.uninstall()
try:
    import mamba_ssm.ops
except ModuleNotFoundError:
    print("gone")
"""
    assert mamba_ssm.EMULATED
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "gone\n"
