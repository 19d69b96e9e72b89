"""A progress bar for batches: on stderr, only on a terminal, and only once the work has taken a while."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

PATIENCE = 2.0  # seconds without a bar


class Progress:
    """Counts prompts and tokens. `wanted` True shows the bar at once, False never, None as described above."""

    def __init__(self, total: int, wanted: bool | None = None) -> None:
        self.total, self.done, self.tokens = total, 0, 0
        self.allowed = sys.stderr.isatty() if wanted is None else wanted
        self.start = time.perf_counter()
        self.patience = PATIENCE if wanted is None else 0.0
        self.bar: Bar | None = None

    def __enter__(self) -> Progress:
        return self

    def advance(self, tokens: int, finished: bool) -> None:
        """`tokens` more were made; `finished`: one more prompt is done."""
        self.tokens += tokens
        self.done += finished
        seconds = time.perf_counter() - self.start
        if self.bar is None and self.allowed and seconds >= self.patience:
            self.bar = _bar(self.total, force=self.patience == 0)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done, rate=f"{self.tokens / max(seconds, 1e-9):.1f} tokens/s")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()


def _bar(total: int, force: bool) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    bar = Bar(*columns, console=Console(stderr=True, force_terminal=force or None), transient=True)
    bar.add_task("prompts", total=total, rate="")
    bar.start()
    return bar
