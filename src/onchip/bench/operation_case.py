"""One call of an operation other than attention, as a benchmark names it."""

from dataclasses import dataclass


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
