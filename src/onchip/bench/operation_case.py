"""One call of an operation other than attention, as a benchmark names it."""

from collections.abc import Sequence
from dataclasses import dataclass

from onchip.bench.cases import TOKENS, Device

STEP_BATCH: dict[Device, int] = {"cpu": 1, "cuda": 128}  # sequences in a decoding step


@dataclass(frozen=True)
class OperationCase:
    """One call of an operation: `sizes` are pairs of a name and a number. `grad`: both passes.

    >>> case = OperationCase("causal_conv1d", "forward", "float32", (("T", 512), ("W", 4)))
    >>> case["T"], case.label
    (512, 'float32 T 512 W 4 forward')
    """

    operation: str
    suite: str
    dtype: str
    sizes: tuple[tuple[str, int], ...]
    grad: bool = False
    operations: float = 0.0  # floating-point

    @property
    def batch(self) -> int:
        """How many sequences: size B, 1 where there is none."""
        return dict(self.sizes).get("B", 1)

    def __getitem__(self, name: str) -> int:
        return dict(self.sizes)[name]

    @property
    def labels(self) -> tuple[str, ...]:
        """What tells the case from others, in words."""
        return (self.dtype, *(f"{name} {size}" for name, size in self.sizes), "both passes" if self.grad else "forward")

    @property
    def label(self) -> str:
        """The same on one line."""
        return " ".join(self.labels)


def sizes_of(suite: str, lengths: Sequence[int], device: Device) -> list[tuple[tuple[str, int], ...]]:
    """Batch and length of a suite's cases. A GPU gets as many tokens in all as for attention; a step has no length.

    >>> sizes_of("forward", [512, 2048], "cpu"), sizes_of("forward", [2048], "cuda")
    ([(('T', 512),), (('T', 2048),)], [(('B', 8), ('T', 2048))])
    """
    if suite == "step":
        return [(("B", STEP_BATCH[device]),)]
    if device == "cpu":
        return [(("T", length),) for length in lengths]
    return [(("B", max(1, TOKENS[device] // length)), ("T", length)) for length in lengths]
