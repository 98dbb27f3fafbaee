"""A measurement as it is kept: one JSON object on one line."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onchip._files import atomic_write
from onchip.bench.cases import Case
from onchip.bench.machine import Machine
from onchip.bench.operation_case import OperationCase
from onchip.bench.timing import Quartiles


@dataclass(frozen=True)
class Row:
    """One case on one machine. `onchip` and its peers are the keys of the dictionaries."""

    case: Any  # a `Case` of attention, or an `OperationCase`
    machine: Machine
    date: str
    served_by: str  # the implementation behind onchip
    rounds: int = 0
    ms: dict[str, Quartiles] = field(default_factory=dict)  # a call; "mm", "read" and "copy" are the ceilings
    ratio: dict[str, Quartiles] = field(
        default_factory=dict
    )  # the peer's time over onchip's: above 1, onchip is faster
    of: str = ""  # the ceiling that `fraction` is of
    fraction: dict[str, float] = field(default_factory=dict)  # of the ceiling's rate, measured in the same rounds
    rate: dict[str, float] = field(default_factory=dict)  # TFLOP/s; GB/s where the ceiling is memory's
    extra: dict[str, float] = field(
        default_factory=dict
    )  # peak memory beyond inputs and outputs, as a fraction of them
    figures: dict[str, float] = field(default_factory=dict)  # of onchip, by name and unit

    @property
    def key(self) -> tuple[Any, int, str]:
        """What the row is about: a newer row with the same key replaces it."""
        return self.case, self.machine.threads, self.machine.malloc

    def to_json(self) -> str:
        """One line."""
        return json.dumps({name: value for name, value in asdict(self).items() if value or name == "case"})

    @classmethod
    def from_json(cls, line: str) -> "Row":
        """The row that `to_json` wrote."""
        fields = json.loads(line)
        fields["case"] = _case(fields["case"])
        fields["machine"] = Machine(**fields["machine"])
        for name in ("ms", "ratio"):
            fields[name] = {key: Quartiles(*value) for key, value in fields.get(name, {}).items()}
        return cls(**fields)


def _case(fields: dict[str, Any]) -> Case | OperationCase:
    if "operation" not in fields:
        return Case(**fields)
    return OperationCase(**fields | {"sizes": tuple((name, size) for name, size in fields["sizes"])})


def read(path: Path) -> list[Row]:
    """The rows in a file; none where there is no file."""
    if not path.exists():
        return []
    return [Row.from_json(line) for line in path.read_text().splitlines() if line]


def merge(path: Path, rows: Iterable[Row]) -> list[Row]:
    """Write `rows` into the file, each in the place of the row with the same key, and return all that are there now."""
    kept = {row.key: row for row in read(path)} | {row.key: row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text("".join(row.to_json() + "\n" for row in kept.values()))
    return list(kept.values())
