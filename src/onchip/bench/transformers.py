"""Models of transformers on onchip's attention against PyTorch's: whole forward passes, and the price of the glue.

The model has SmolLM2-135M's shape and random weights, on which the time does not depend.
"""

import copy
import dataclasses
import datetime
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import onchip
from onchip.bench.attention import Error, judge, rounded, served_by, threads_set
from onchip.bench.cases import Case
from onchip.bench.machine import Machine
from onchip.bench.rows import Row
from onchip.bench.timing import Candidate, interleave, quartiles, ratio
from onchip.integrations.transformers import NAME, register

SMOLLM2: Mapping[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
CHECKED = 64  # tokens of which the logits are compared before anything is timed


@functools.cache
def model_of(dtype: str) -> Any:
    """A Llama of SmolLM2's shape in that type, the same on every run, whose logits are as near float64 as SDPA's.

    Raises:
        ArithmeticError: they are not. Nothing was timed.
    """
    import transformers

    register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMOLLM2)
    model: Any = transformers.LlamaForCausalLM(config)
    model = model.eval().to(getattr(torch, dtype))
    _check(model, dtype)
    return model


def measure(case: Case, machine: Machine, *, seconds: float = 3.0, min_rounds: int = 5) -> Row:
    """Time the case with onchip and with SDPA, taking turns; of glue, the layer's call and onchip's own."""
    threads = 1 if case.suite == "glue" else machine.threads
    candidates = _glue(case) if case.suite == "glue" else _passes(case)
    device = torch.device("cpu")
    with threads_set(threads), torch.no_grad():
        times = interleave(candidates, device, seconds=seconds, min_rounds=min_rounds)
    return Row(
        case=case,
        machine=dataclasses.replace(machine, threads=threads),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        served_by=served_by(case, device),
        rounds=len(times["onchip"]),
        ms={name: rounded(quartiles([1e3 * t for t in values])) for name, values in times.items()},
        ratio={name: rounded(ratio(times[name], times["onchip"])) for name in times if name != "onchip"},
    )


def _passes(case: Case) -> dict[str, Candidate]:
    """Reading a prompt into a new cache, or a step after it."""
    model = model_of(case.dtype)
    tokens = torch.randint(SMOLLM2["vocab_size"], (1, case.k_len), generator=torch.Generator().manual_seed(0))

    def candidate(name: str) -> Candidate:
        scope = functools.partial(_running, model, name)
        if case.suite == "prefill":
            return Candidate(functools.partial(model, tokens, use_cache=True, logits_to_keep=1), scope)
        with scope(), torch.no_grad():
            past = model(tokens[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        return Candidate(functools.partial(_step, model, tokens[:, -1:], past), scope)

    return {"onchip": candidate(NAME), "sdpa": candidate("sdpa")}


def _step(model: Any, token: Tensor, past: Any) -> None:
    model(token, past_key_values=past, use_cache=True)
    past.crop(-1)


def _glue(case: Case) -> dict[str, Candidate]:
    """What transformers calls, and what it comes to."""
    import transformers

    register()
    interface: Any = transformers.AttentionInterface
    layer: Callable[..., Any] = interface()[NAME]
    module = torch.nn.Module()
    shapes = (case.heads, case.q_len), (case.heads_kv, case.k_len), (case.heads_kv, case.k_len)
    q, k, v = (torch.randn(1, *shape, case.head_dim).to(getattr(torch, case.dtype)) for shape in shapes)
    ours = tuple(x.transpose(1, 2) for x in (q, k, v))
    return {
        "onchip": Candidate(functools.partial(layer, module, q, k, v, None, scaling=0.125)),
        "attention": Candidate(functools.partial(onchip.attention, *ours, scale=0.125)),
    }


def _check(model: Any, dtype: str) -> None:
    tokens = torch.randint(SMOLLM2["vocab_size"], (1, CHECKED), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        want = _logits(exact, "eager", tokens)
        del exact
        ours, peer = (_logits(model, name, tokens) for name in (NAME, "sdpa"))
    our_error, peers = ((x.double() - want).abs().max().item() for x in (ours, peer))
    eps = torch.finfo(ours.dtype).eps
    judge(f"SmolLM2's shape in {dtype}", Error("logits", our_error, peers, want.abs().max().item(), eps))


def _logits(model: Any, name: str, tokens: Tensor) -> Tensor:
    """Of a prompt, and of a step after it."""
    with _running(model, name):
        prompt = model(tokens[:, :-1], use_cache=True)
        step = model(tokens[:, -1:], past_key_values=prompt.past_key_values)
    return torch.cat([prompt.logits, step.logits], dim=1)


@contextmanager
def _running(model: Any, name: str) -> Iterator[None]:
    model.set_attn_implementation(name)
    yield
