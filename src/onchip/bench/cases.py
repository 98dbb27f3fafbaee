"""What `onchip bench` measures: the cases, by suite, and how much work each is."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

AttentionSuite = Literal["forward", "backward", "bf16", "window", "decode", "memory", "overhead"]
ModelSuite = Literal["prefill", "step", "glue"]
Suite = AttentionSuite | ModelSuite
Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Device = Literal["cpu", "cuda"]
SUITES: tuple[AttentionSuite, ...] = get_args(AttentionSuite)
MODEL_SUITES: tuple[ModelSuite, ...] = get_args(ModelSuite)
GPU_SUITES: tuple[AttentionSuite, ...] = ("forward", "backward", "decode", "window", "memory")
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
BYTES: dict[Dtype, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

WIDTH: dict[Device, int] = {"cpu": 512, "cuda": 2048}  # heads × head_dim of the square cases
TOKENS: dict[Device, int] = {"cpu": 1, "cuda": 16384}  # in all, as the papers have it: short sequences come in batches
LENGTHS = (512, 1024, 2048, 4096, 8192)
QUICK_LENGTHS = (512, 1024)
MODEL_LENGTHS = (128, 512, 2048, 4096)
GPU_LENGTHS = (1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Case:
    """One call of attention. `window` counts the keys a query sees, itself the last (left = window - 1).

    `grad`: both passes; `alone`: of the two only the backward pass is timed.
    """

    suite: Suite
    dtype: Dtype
    heads: int
    heads_kv: int
    q_len: int
    k_len: int
    head_dim: int
    causal: bool = False
    window: int | None = None
    grad: bool = False
    batch: int = 1
    alone: bool = False

    @property
    def pairs(self) -> int:
        """How many (query, key) pairs of one head are not masked."""
        if not self.causal:
            return self.q_len * self.k_len
        last_keys = range(self.k_len - self.q_len + 1, self.k_len + 1)
        return sum(min(keys, self.window or keys) for keys in last_keys)

    @property
    def operations(self) -> float:
        """Floating-point operations: two products of matrices forward, five more backward."""
        forward = 4.0 * self.batch * self.heads * self.pairs * self.head_dim
        return forward * (2.5 if self.alone else 3.5 if self.grad else 1.0)

    @property
    def cache_bytes(self) -> int:
        """The bytes of K and V, which a decode step has to read."""
        return 2 * self.batch * self.k_len * self.heads_kv * self.head_dim * BYTES[self.dtype]

    @property
    def labels(self) -> tuple[str, ...]:
        """What tells the case from others, in words."""
        lengths = f"T {self.q_len}" if self.q_len == self.k_len else f"Tq {self.q_len}, Tk {self.k_len}"
        heads = f"H {self.heads}" if self.heads == self.heads_kv else f"H {self.heads}/{self.heads_kv}"
        mask = f"window {self.window}" if self.window else "causal" if self.causal else "full"
        passes = "backward" if self.alone else "both passes" if self.grad else "forward"
        return (self.dtype, lengths, f"{heads}, D {self.head_dim}", mask, passes)

    @property
    def label(self) -> str:
        """The same on one line."""
        return " ".join(self.labels)


def cases(
    suite: AttentionSuite,
    *,
    dtypes: Sequence[Dtype] = (),
    lengths: Sequence[int] = (),
    head_dims: Sequence[int] = (),
    quick: bool = False,
    device: Device = "cpu",
) -> Iterator[Case]:
    """The cases of a suite; what is not given has the suite's own default on the device.

    >>> [case.label for case in cases("forward", lengths=[512], head_dims=[64])]
    ['float32 T 512 H 8, D 64 full forward', 'float32 T 512 H 8, D 64 causal forward']
    """
    default_dtypes: dict[AttentionSuite, Sequence[Dtype]] = {"bf16": ["bfloat16"], "decode": ["float32", "bfloat16"]}
    default_dims: dict[AttentionSuite, Sequence[int]] = {"decode": [128], "memory": [64], "overhead": [64]}
    for dtype in dtypes or (["bfloat16"] if device == "cuda" else default_dtypes.get(suite, ["float32"])):
        for head_dim in head_dims or default_dims.get(suite, [64, 128]):
            for length in lengths or _default_lengths(suite, quick, device):
                yield from _variants(suite, dtype, length, head_dim, device)


def _default_lengths(suite: AttentionSuite, quick: bool, device: Device) -> Sequence[int]:
    match suite:
        case "bf16":  # SDPA needs 15 s for one pass over 4096 on two cores
            return QUICK_LENGTHS if quick else LENGTHS[:3]
        case "window":
            return [1024 if quick else 4096]
        case "decode":
            return [4096 if quick else 65536 if device == "cuda" else 32768]
        case "memory":
            return [1024 if quick else 8192]
        case "overhead":
            return [8]
        case _:
            return QUICK_LENGTHS if quick else GPU_LENGTHS if device == "cuda" else LENGTHS


def _variants(suite: AttentionSuite, dtype: Dtype, length: int, head_dim: int, device: Device) -> Iterator[Case]:
    heads, batch = max(1, WIDTH[device] // head_dim), max(1, TOKENS[device] // length)
    square = functools.partial(Case, suite, dtype, heads, heads, length, length, head_dim, batch=batch)
    if suite == "decode":
        yield Case(suite, dtype, 32, 8, 1, length, head_dim)
    elif suite == "overhead":
        yield Case(suite, dtype, 1, 1, length, length, head_dim)
    elif suite == "window":
        for grad in (False, True):
            yield square(causal=True, window=256, grad=grad)
    elif suite == "memory":
        for grad in (False, True):
            yield square(grad=grad)
    else:
        for causal in (False, True):
            backward = suite == "backward"
            yield square(causal=causal, grad=backward or suite == "bf16", alone=backward and device == "cuda")


def model_cases(
    suite: ModelSuite, *, dtypes: Sequence[Dtype] = (), lengths: Sequence[int] = (), quick: bool = False
) -> Iterator[Case]:
    """One layer of SmolLM2-135M: what a forward pass over a prompt, or a step that sees as many keys, has 30 times.

    >>> [case.label for case in model_cases("step", dtypes=["float32"], lengths=[512])]
    ['float32 Tq 1, Tk 512 H 9/3, D 64 causal forward']
    """
    default_dtypes: list[Dtype] = ["float32"] if suite == "glue" else ["float32", "bfloat16"]
    default_lengths = MODEL_LENGTHS[:1] if quick or suite == "glue" else MODEL_LENGTHS
    for dtype in dtypes or default_dtypes:
        for length in lengths or default_lengths:
            yield Case(suite, dtype, 9, 3, length if suite == "prefill" else 1, length, 64, causal=True)
