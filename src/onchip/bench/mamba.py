"""Whole models of the Mamba family: transformers' with onchip and without, and decoding against the rate of memory.

Weights are random, on which the time does not depend. Without onchip transformers runs its own functions in PyTorch,
as it does where mamba_ssm is not installed. What is compared before the clock starts is `CHECKED` tokens long.
"""

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import onchip
from onchip.bench.cases import Device
from onchip.bench.operation_case import OperationCase
from onchip.bench.operations import CPU, Contender, Contest, optional
from onchip.models import LanguageModel
from onchip.models.foreign import read_foreign

SUITES = ("forward", "train", "step", "context")
ON_REQUEST = ("once",)
LENGTHS = {
    "forward": (512, 2048, 8192),
    "train": (256, 512),
    "step": (64,),
    "context": (64, 1024, 8192),
    "once": (1024,),
}
DTYPES = {"step": ("float32", "bfloat16")}

SMALL: Mapping[str, Any] = {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 257, "state_size": 16}
MAMBA2_130M: Mapping[str, Any] = {
    "hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50288, "state_size": 128, "num_heads": 24, "n_groups": 1,
    "tie_word_embeddings": True, "initializer_range": 0.02,
}  # fmt: skip
SMALL2: Mapping[str, Any] = {**MAMBA2_130M, **SMALL, "state_size": 128, "num_heads": 8}
CHECKED = 32


def cases(
    suites: Sequence[str], *, dtypes: Sequence[str], lengths: Sequence[int], quick: bool, device: Device = "cpu"
) -> list[OperationCase]:
    """Each suite at its own lengths in float32, steps in bfloat16, too, on a GPU all in it, unless asked otherwise.

    >>> [case.label for case in cases(["train", "step"], dtypes=["float32"], lengths=[], quick=True)]
    ['float32 T 256 D 256 L 4 both passes', 'float32 T 64 D 768 L 24 forward']
    """
    return [
        OperationCase(
            "mamba",
            suite,
            dtype,
            (("T", length), ("D", shape["hidden_size"]), ("L", shape["num_hidden_layers"])),
            grad=suite in ("train", "once"),
            operations=1e7 * length,
        )
        for suite in suites
        for shape in [MAMBA2_130M if suite == "step" else SMALL]
        for dtype in dtypes or (("bfloat16",) if device == "cuda" else DTYPES.get(suite, ("float32",)))
        for length in lengths or (LENGTHS[suite][:1] if quick else LENGTHS[suite])
    ]


def contest(case: OperationCase, device: torch.device = CPU) -> Contest:
    """With onchip and without, and over mambapy's scan where that is installed."""
    return (_steps if case.suite in ("step", "context") else _passes)(case, device)


def _passes(case: OperationCase, device: torch.device) -> Contest:
    """A pass over T tokens, or both, of transformers' Mamba."""
    model = _model("Mamba", SMALL, case.dtype, device)
    tokens = _tokens(case["T"], SMALL).to(device)
    run = functools.partial(_train if case.grad else _logits, model, tokens)
    few = functools.partial(_train if case.grad else _logits, model, tokens[:, :CHECKED])

    def contender(scope: Callable[[], Any]) -> Contender:
        return Contender(run, scope=scope, checked=functools.partial(_results, few, model))

    def truth() -> tuple[Tensor, ...]:
        exact = copy.deepcopy(model).double()
        with without_onchip("mamba"):
            return _results(functools.partial(few.func, exact, *few.args[1:]), exact)

    contenders = {
        "onchip": contender(nullcontext),
        "transformers": contender(functools.partial(without_onchip, "mamba")),
    }
    mambapy = optional("mambapy", lambda: contender(functools.partial(_over_mambapy, model)))
    return Contest(
        contenders | mambapy,
        truth=truth,
        names=("logits", "gradients") if case.grad else ("logits",),
        served_by=_served_by(device),
        ceiling=None,
        once=("transformers",) if case.suite == "once" else (),
        whole_model=True,
        tokens=case["T"],
    )


def _steps(case: OperationCase, device: torch.device) -> Contest:
    """A decoding step after T tokens: of onchip's own Mamba-2 with transformers' weights, and of theirs."""
    shape = MAMBA2_130M if case.suite == "step" else SMALL2
    model = _model("Mamba2", shape, case.dtype, device)
    tokens = _tokens(case["T"], shape).to(device)
    ours = _ours(model)
    few = tokens[:, :CHECKED]
    state = ours.initial_state(1).nbytes

    def truth() -> tuple[Tensor, ...]:
        with without_onchip("mamba2"):
            return (_Theirs(copy.deepcopy(model).double(), few)(),)

    def contender(decoder: Callable[[Any, Tensor], Callable[[], Tensor]], model: Any, scope: Any) -> Contender:
        with scope(), torch.no_grad():
            decode = decoder(model, tokens)
        return Contender(lambda: (decode(),), scope=scope, checked=lambda: (decoder(model, few)(),))

    return Contest(
        {
            "onchip": contender(_Ours, ours, torch.no_grad),
            "transformers": contender(_Theirs, model, functools.partial(without_onchip, "mamba2")),
            "onchip in transformers": contender(_Theirs, model, torch.no_grad),
        },
        truth=truth,
        names=("logits",),
        nbytes=sum(p.nbytes for p in model.parameters()) if case.suite == "step" else 0,
        served_by=_served_by(device),
        ceiling="read" if case.suite == "step" else None,
        whole_model=True,
        figures={"state, KB": state / 1e3},
    )


class _Ours:
    """onchip's model after `tokens` but the last, which every call reads once more."""

    def __init__(self, model: LanguageModel, tokens: Tensor) -> None:
        self.model, self.token = model, tokens[:, -1]
        with torch.no_grad():
            state = model.prefill(tokens[:, :-1], model.initial_state(len(tokens)))[1]
        self.state = state.expendable()

    def __call__(self) -> Tensor:
        with torch.no_grad():
            logits, self.state = self.model.step(self.token, self.state)
        return logits


class _Theirs:
    """The same of transformers' model."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.model, self.token = model, tokens[:, -1:]
        with torch.no_grad():
            self.cache = model(tokens[:, :-1], use_cache=True).cache_params

    def __call__(self) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model(self.token, cache_params=self.cache, use_cache=True).logits
        return logits[:, -1]


def _logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens, use_cache=False).logits
    return logits


def _train(model: Any, tokens: Tensor) -> Tensor:
    """A training step without the optimiser."""
    model.zero_grad()
    logits: Tensor = model(tokens, use_cache=False).logits
    loss = F.cross_entropy(logits[0, :-1].to(torch.promote_types(logits.dtype, torch.float32)), tokens[0, 1:])
    loss.backward()  # type: ignore[no-untyped-call]
    return logits


def _results(run: Callable[[], Tensor], model: Any) -> tuple[Tensor, ...]:
    """The logits, and all gradients in one after a training step."""
    model.zero_grad()
    logits = run().detach()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return (logits, torch.cat(gradients)) if gradients else (logits,)


@functools.lru_cache(maxsize=1)
def _made(family: str, shape: tuple[tuple[str, Any], ...], dtype: str, device: torch.device) -> Any:
    import transformers

    from onchip.integrations.transformers import register

    register()
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**dict(shape))
    return getattr(transformers, f"{family}ForCausalLM")(config).to(device, getattr(torch, dtype))


def _model(family: str, shape: Mapping[str, Any], dtype: str, device: torch.device = CPU) -> Any:
    """transformers' model, the same on every run, with onchip under it."""
    return _made(family, tuple(shape.items()), dtype, device)


def _ours(model: Any) -> LanguageModel:
    """onchip's model with the weights of transformers'."""
    family, config = read_foreign(model.config.to_dict())
    ours = LanguageModel(config).to(model.device, model.dtype)
    ours.load_state_dict(family.to_ours(family.canonical(model.state_dict(), config), config))
    return ours


def _served_by(device: torch.device) -> str:
    x = torch.zeros(1, 1, 1, device=device)
    return str(onchip.explain(onchip.causal_conv1d, x, x[0]).chosen)


def _tokens(length: int, shape: Mapping[str, Any]) -> Tensor:
    return torch.randint(3, shape["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))


@contextmanager
def without_onchip(name: str) -> Iterator[None]:
    """transformers' own functions in the modeling file of that name, in the place of onchip's."""
    module = vars(sys.modules[f"transformers.models.{name}.modeling_{name}"])
    ours = {key: f for key, f in module.items() if hasattr(f, "through_onchip")}
    module.update({key: inspect.unwrap(f) for key, f in ours.items()})
    try:
        yield
    finally:
        module.update(ours)


@contextmanager
def _over_mambapy(model: Any) -> Iterator[None]:
    """transformers' own functions, but for the scan, which is mambapy's."""
    mixers = [layer.mixer for layer in model.backbone.layers]
    with without_onchip("mamba"):
        for mixer in mixers:
            mixer.use_mambapy = True
        try:
            yield
        finally:
            for mixer in mixers:
                mixer.use_mambapy = False
