"""How far a run is, on stderr: a live bar with loss, speed and time left on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


BAR = 20  # characters of the bar itself


class Progress:
    """Follows the steps from `done` to `steps`; on ranks that do not talk, `wanted` is False."""

    def __init__(self, steps: int, done: int, wanted: bool = True) -> None:
        self.steps, self.wanted, self.first = steps, wanted, done
        self.start = time.perf_counter()
        self.rate: list[str] = []  # tokens/s, and their share of the products' rate, when they were logged last
        self.bar: Bar | None = _bar(steps, done) if wanted and sys.stderr.isatty() else None

    def step(self, done: int, loss: float) -> None:
        """One more step is done."""
        if self.bar is not None:
            gone = clock(time.perf_counter() - self.start)
            words = [f"{done:,}/{self.steps:,}", f"loss {loss:.4f}", *self.rate, f"{gone} gone", f"{clock(self.left(done))} left"]
            fewer = [*self.rate[1:], words[-2], *self.rate[:1], words[1]]  # what goes first where the terminal is narrow
            text = that_fit(words, fewer, self.bar.console.width - BAR - 1)
            self.bar.update(self.bar.task_ids[0], completed=done, words=text)

    def left(self, done: int) -> float:
        """Seconds until the last step, at the speed so far."""
        return (time.perf_counter() - self.start) / max(done - self.first, 1) * (self.steps - done)

    def logged(self, line: dict[str, Any]) -> None:
        """A line of metrics was written."""
        self.rate = [f"{line['tokens_per_s']:,.0f} tokens/s"]
        if line.get("mfu") is not None:
            self.rate.append(f"{line['mfu']:.0%} of the products' rate")
        if self.wanted and self.bar is None:
            words = [f"step {line['step']:,} of {self.steps:,}", f"loss {line['loss']:.4f}", *self.rate]
            print("  ".join([*words, f"{clock(self.left(line['step']))} left"]), file=sys.stderr, flush=True)

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


def that_fit(words: Sequence[str], fewer: Sequence[str], width: int) -> str:
    """The words in a line of at most `width` characters, those of `fewer` left out in turn until they fit."""
    kept, rest = list(words), list(fewer)
    while rest and len("  ".join(kept)) > width:
        kept.remove(rest.pop(0))
    return "  ".join(kept)


def _bar(steps: int, done: int) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(bar_width=BAR), TextColumn("{task.fields[words]}", markup=False))
    bar = Bar(*columns, console=Console(stderr=True))
    bar.add_task("steps", total=steps, completed=done, words=f"{done:,}/{steps:,}")
    bar.start()
    return bar
