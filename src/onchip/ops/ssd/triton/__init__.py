"""ssd in Triton: the op's GPU implementation, forward, backward and step."""

import torch
from torch import Tensor

from onchip.ops._triton import on_device_of
from onchip.ops.ssd.call import Call
from onchip.ops.ssd.triton import launches


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """The op on a GPU."""
    out, state = call.results()
    with on_device_of(call.x):
        for launch in launches.forward(launches.Plan.of(call), out, state):
            launch.run()
    return out, state


def backward(grad_out: Tensor, grad_state: Tensor | None, call: Call) -> tuple[Tensor, ...]:
    """Its derivative on a GPU."""
    plan, grads = launches.Plan.of_backward(call), call.gradients()
    partial = launches.Partial.of(plan)
    with on_device_of(call.x):
        for launch in launches.backward(plan, grad_out, grad_state, grads, partial):
            launch.run()
    _, _, grad_A, grad_B, grad_C, grad_D, _, grad_dt_bias, _ = grads
    for grad, per_head in ((grad_B, partial.B), (grad_C, partial.C)):
        grad.copy_(per_head.unflatten(-2, (call.B.shape[-2], -1)).sum(-2))
    sums = partial.sums.sum(0)
    grad_A.copy_(sums[:, 0])
    if call.dt_bias is not None:
        grad_dt_bias.copy_(sums[:, 1])
    if call.D is not None:
        total = partial.D.sum(0)
        grad_D.copy_(total if call.D.ndim == 2 else total.sum(1))
    return grads


def step(
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
    dt_low: float,
    dt_high: float,
    out_state: Tensor,
) -> Tensor:
    """The step on a GPU; the new state is written into `out_state`, which may be `state`."""
    y = torch.empty(x_t.shape, dtype=x_t.dtype, device=x_t.device)
    at_once = (None if t is None else t.unsqueeze(1) for t in (x_t, dt_t, B_t, C_t, z))
    x, dt, B, C, gate = at_once
    call = Call(x, dt, A, B, C, D, gate, dt_bias, state, None, dt_softplus, dt_low, dt_high, None)  # type: ignore[arg-type]
    with on_device_of(x_t):
        launches.step(call, out_state, y.unsqueeze(1)).run()
    return y
