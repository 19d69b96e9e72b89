"""How far a run is, on stderr: a live bar with speed, loss and time left on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class Progress:
    """Follows the steps from `done` to `steps`; on ranks that do not talk, `wanted` is False."""

    def __init__(self, steps: int, done: int, wanted: bool = True) -> None:
        self.steps, self.wanted, self.first = steps, wanted, done
        self.start = time.perf_counter()
        self.bar: Bar | None = _bar(steps, done) if wanted and sys.stderr.isatty() else None

    def step(self, done: int, loss: float) -> None:
        """One more step is done."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done, loss=f"loss {loss:.4f}")

    def logged(self, line: dict[str, Any]) -> None:
        """A line of metrics was written."""
        text = f"{line['tokens_per_s']:,.0f} tokens/s" + ("" if line.get("mfu") is None else f"  {line['mfu']:.0%} of the products' rate")
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], rate=text)
        elif self.wanted:
            left = (time.perf_counter() - self.start) / max(line["step"] - self.first, 1) * (self.steps - line["step"])
            print(
                f"step {line['step']:,} of {self.steps:,}  loss {line['loss']:.4f}  {text}  {clock(left)} left", file=sys.stderr, flush=True
            )

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self.wanted:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()


def clock(seconds: float) -> str:
    """A time as people read it: 4:05, or 1:02:00 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar(steps: int, done: int) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TextColumn("{task.fields[rate]}"))
    bar = Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
    bar.add_task("steps", total=steps, completed=done, loss="", rate="")
    bar.start()
    return bar
