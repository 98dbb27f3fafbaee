"""onchip's state space ops and convolution behind transformers' Mamba, Mamba-2 and whatever uses the same hooks.

A modeling file of transformers decorates a PyTorch function with the name of the function in mamba_ssm or causal_conv1d
that is to take its place where that package is installed. Here ours takes it. The mixers of Mamba-1 are mended, too:
theirs read a prompt in chunks as if each chunk began with an empty state.
"""

import functools
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import __version__, integrations
from transformers.integrations import hub_kernels

from onchip.integrations.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from onchip.integrations.mamba_ssm.selective_scan_interface import scan, selective_scan_fn
from onchip.integrations.mamba_ssm.selective_state_update import selective_state_update
from onchip.integrations.mamba_ssm.ssd_combined import mamba_chunk_scan_combined

_HOOK, _CLASS_HOOK = "use_kernel_func_from_hub_with_fallback", "use_kernelized_func"


class _Carried(threading.local):
    """The states from which the next scans of this thread begin. (torch.compile reads no context variables.)"""

    states: Iterator[Tensor] | None = None


_carried = _Carried()


@functools.wraps(selective_scan_fn)
def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    state = None if _carried.states is None else next(_carried.states)
    out, last = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state)
    return (out, last) if return_last_state else out


def _unfused(*args: Any) -> None:
    """In the place of a whole block's function: None tells a mixer to call the others, one by one.

    All of them are served, so that nothing is lost. mamba_ssm's own block is not what transformers' FalconMamba
    computes in PyTorch, for one: it normalises the steps elsewhere.
    """


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
    "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
    "mamba_inner_fn": _unfused,
    "mamba_split_conv1d_scan_combined": _unfused,
    "selective_scan_fn": _selective_scan,
    "selective_state_update": selective_state_update,
}


def register() -> None:
    """Put onchip under the models whose modeling files are imported, and under those that will be."""
    if not hasattr(hub_kernels, _HOOK):
        warnings.warn(
            f"onchip cannot serve state space models in transformers {__version__}, which has no hook for them; "
            "5.15 has",
            stacklevel=3,
        )
        return
    for name in [name for name in sys.modules if name.startswith("transformers.models.")]:
        _serve(sys.modules[name])
    theirs, class_theirs = getattr(hub_kernels, _HOOK), getattr(hub_kernels, _CLASS_HOOK)
    if not hasattr(theirs, "through_onchip"):
        for place in (integrations, hub_kernels):
            setattr(place, _HOOK, _hook(theirs))
            setattr(place, _CLASS_HOOK, _class_hook(class_theirs))


def _hook(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """The decorator of functions, which takes ours where there is one of that name."""

    @functools.wraps(theirs)
    def hook(func_name: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        if func_name in _FUNCTIONS:
            return lambda function: _through_onchip(func_name, function)
        return theirs(func_name, *args, **kwargs)  # type: ignore[no-any-return]

    hook.through_onchip = True  # type: ignore[attr-defined]
    return hook


def _class_hook(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """The decorator of the mixers' classes, which names the functions that they call."""

    @functools.wraps(theirs)
    def hook(functions: Any) -> Callable[..., Any]:
        used = functions if isinstance(functions, Sequence) else [functions]

        def decorate(cls: type[nn.Module]) -> type[nn.Module]:
            if any(getattr(function, "through_onchip", None) == "selective_scan_fn" for function in used):
                _carry_states(cls)
            return theirs(functions)(cls)  # type: ignore[no-any-return]

        return decorate

    return hook


def _serve(module: ModuleType) -> None:
    """What `_hook` and `_class_hook` do, in a modeling file that was imported before."""
    scans = set()
    for attribute, function in list(vars(module).items()):
        free = getattr(getattr(function, "__code__", None), "co_freevars", ())
        if "func_name" not in free or "torch_function" not in free:
            continue
        name = inspect.getclosurevars(function).nonlocals["func_name"]
        if name in _FUNCTIONS:
            setattr(module, attribute, _through_onchip(name, function))
            if name == "selective_scan_fn":
                scans.add(attribute)
    for cls in list(vars(module).values()):
        if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == module.__name__:
            forward = inspect.unwrap(cls.forward)
            if scans & set(getattr(forward, "__code__", _serve.__code__).co_names):
                _carry_states(cls)


def _through_onchip(name: str, theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`theirs` computed by our function of that name; as theirs does, it takes what it knows of the keywords."""
    ours = _FUNCTIONS[name]
    known = frozenset(inspect.signature(ours).parameters)

    @functools.wraps(theirs)
    def through_onchip(*args: Any, **kwargs: Any) -> Any:
        if "seq_idx" in known and kwargs.get("seq_idx") is None and kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError(
                "seq_idx must be given where cu_seq_lens_q is: without it the sequences would share a state"
            )
        return ours(*args, **{key: value for key, value in kwargs.items() if key in known})

    through_onchip.through_onchip = name  # type: ignore[attr-defined]
    return through_onchip


def _carry_states(cls: type[nn.Module]) -> None:
    """Make a Mamba-1 mixer continue from the cache's state where it reads several tokens.

    Its forward pass does not hand the state to the scan: it is left where our scan looks. Zamba's mixer scans one head
    after the other.
    """
    theirs: Callable[..., Any] = cls.forward

    @functools.wraps(theirs)
    def forward(self: Any, hidden_states: Tensor, cache_params: Any = None, *args: Any, **kwargs: Any) -> Any:
        for name in ("seq_idx", "cu_seq_lens_q"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} must be None: {cls.__name__} does not reset its state between packed sequences"
                )
        state = None
        if cache_params is not None and hidden_states.shape[1] > 1:
            state = cache_params.get_recurrent_state(self.layer_idx)
        if state is None:
            return theirs(self, hidden_states, cache_params, *args, **kwargs)
        state = state.clone() if torch.is_grad_enabled() else state  # the cache is written before the backward pass
        _carried.states = iter(state.unbind(1) if state.ndim == 4 else (state,))
        try:
            return theirs(self, hidden_states, cache_params, *args, **kwargs)
        finally:
            _carried.states = None

    cls.forward = forward
