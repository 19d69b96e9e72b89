"""How a pull looks: a bar with rate and time left on a terminal, a line for every tenth elsewhere. All of it on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from qwen2.weights.pull import Progress, human_size

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Progress as Bars
    from rich.progress import TaskID


class PullWatcher:
    """Called with each step of a pull; a context, so that the bar is put away however the pull ends."""

    def __init__(self, name: str, quiet: bool = False) -> None:
        self.name, self.quiet = name, quiet
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._tenth = -1
        self._last: Progress | None = None

    def __enter__(self) -> PullWatcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()
        if kind is KeyboardInterrupt and self._last is not None and not self.quiet:
            how_far = f"{human_size(self._last.done)} of {human_size(self._last.total)}"
            print(f"\n{self.name}: interrupted at {how_far}; the same command goes on", end="", file=sys.stderr)

    def __call__(self, step: Progress) -> None:
        if self.quiet or step == self._last:  # a wait says again and again that it waits
            return
        self._last = step
        if step.note:
            self._say(step.note)
        elif sys.stderr.isatty():
            self._draw(step)
        elif step.total and step.done * 10 // step.total > self._tenth:
            self._tenth = step.done * 10 // step.total
            self._say(f"{human_size(step.done)} of {human_size(step.total)}")

    def _say(self, text: str) -> None:
        if self._bars is not None:
            self._bars.console.print(f"{self.name}: {text}", highlight=False, markup=False)
        else:
            print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def _draw(self, step: Progress) -> None:
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        if self._task is None:  # what an earlier pull has left is no part of the rate
            self._task = self._bars.add_task(self.name, total=step.total, completed=step.done)
        self._bars.update(self._task, completed=step.done)


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Bars(*columns, console=Console(stderr=True))
