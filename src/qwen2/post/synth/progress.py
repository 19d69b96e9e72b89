"""How far sampling is, on stderr: a live bar on a terminal, a line now and then anywhere else; acceptance, speed and time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from qwen2.train.progress import clock

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

EVERY = 10.0  # seconds between two lines


class Progress:
    """Follows prompts from `done` to `total`; `shown` "auto" is a bar on a terminal and lines elsewhere, False is silence."""

    def __init__(self, total: int, done: int, shown: bool | Literal["auto"]) -> None:
        self.total, self.done, self.first, self.shown = total, done, done, bool(shown)
        self.answers = self.right = self.tokens = 0
        self.start = self.last = time.perf_counter()
        self.bar: Bar | None = _bar(total, done) if self.shown and sys.stderr.isatty() else None

    def prompt(self, record: dict[str, Any]) -> None:
        """One more is finished."""
        answers = record.get("answers", ())
        self.done += 1
        self.answers += len(answers)
        self.right += sum(answer["right"] is True for answer in answers)
        self.tokens += sum(answer["tokens"] for answer in answers)
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done, text=self.text(now))
        elif self.shown and now - self.last >= EVERY:
            self.last = now
            left = (now - self.start) / (self.done - self.first) * (self.total - self.done)
            print(f"prompt {self.done:,} of {self.total:,}  {self.text(now)}  {clock(left)} left", file=sys.stderr, flush=True)

    def text(self, now: float) -> str:
        """Acceptance and speed of this sitting."""
        seconds = max(now - self.start, 1e-9)
        accepted = f"{self.right / self.answers:.1%} right" if self.answers else "no answers yet"
        return f"{accepted}  {self.answers / seconds:.1f} answers/s  {self.tokens / seconds:,.0f} tokens/s"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.shown and self.answers:
            now = time.perf_counter()
            print(f"{self.answers:,} answers in {clock(now - self.start)}  {self.text(now)}", file=sys.stderr, flush=True)


def _bar(total: int, done: int) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    bar = Bar(*columns, console=Console(stderr=True))
    bar.add_task("prompts", total=total, completed=done, text="")
    bar.start()
    return bar
