"""What a person sees of a run: a moving bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINES = 20


class Display(Protocol):
    """Shown each step; `line` is the step's line of metrics."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None: ...

    def show(self, line: dict[str, Any]) -> None:
        """Show one step."""


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, line: dict[str, Any]) -> None:
        """Show nothing."""


class Lines(Silent):
    """A line at every twentieth of the run and at every look at the held-out text, for logs."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self._console, self._steps, self._done = console, steps, done
        self._every = max(1, steps // _LINES)
        self._start = time.monotonic()

    def show(self, line: dict[str, Any]) -> None:
        """Print the step's line where its turn has come."""
        step, held_out = line["step"], line.get("validation_bits_per_byte")
        if step % self._every and step < self._steps and held_out is None:
            return
        seconds = (time.monotonic() - self._start) / (step - self._done) * (self._steps - step)
        parts = [
            f"step {step:>{len(str(self._steps))}}/{self._steps}",
            f"loss {line['loss']:.3f}",
            f"{line['tokens_per_second']:,.0f} tokens/s",
            f"{int(seconds) // 60}:{int(seconds) % 60:02d} left",
        ]
        if held_out is not None:
            parts.append(f"held out {held_out:.3f} bits per byte")
        self._console.print("  ".join(parts), highlight=False)


class Bar(Silent):
    """A bar with the loss, tokens per second and the time left; each look at the held-out text stays as a line."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self._progress = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            # Steps are even; a long memory keeps the estimate calm through checkpoints and evaluations.
            speed_estimate_period=120,
        )
        self._steps = steps
        self._task = self._progress.add_task("", total=steps, completed=done, loss="", speed="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, line: dict[str, Any]) -> None:
        """Move the bar."""
        self._progress.update(
            self._task, completed=line["step"], loss=f"{line['loss']:.3f}", speed=f"{line['tokens_per_second']:,.0f}"
        )
        if (held_out := line.get("validation_bits_per_byte")) is not None:
            step = f"step {line['step']:>{len(str(self._steps))}}"
            self._progress.console.print(f"{step}  held out {held_out:.3f} bits per byte", highlight=False)


def display(console: Console, steps: int, done: int) -> Display:
    """A bar on a terminal, lines elsewhere; the run has `done` of its `steps` behind it."""
    return (Bar if console.is_terminal else Lines)(console, steps, done)
