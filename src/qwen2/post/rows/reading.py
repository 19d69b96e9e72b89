"""Rows made into ids by several threads, in their order, and how far that is, on stderr.

Most of a row's time goes into the tokenizer's own code, which runs beside other threads (tokenizer.py), so that threads are enough and
nothing has to be sent to another process. (700 tokens a row: of 1.2 ms 0.9 are such; a pool of processes takes a third more time of the
processors, and new ones seconds each to start.) Rows come back in the order in which they were read, so that nothing depends on how many
threads there are.

What is left out: reading files, which the caller's thread does meanwhile, and a cache: rows are encoded again at every start.

    with Reading(threads=4, shown=True) as reading:
        for record, made in reading(encode_one, read(["data.jsonl"])): ...
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 256  # rows that were read and not taken yet, at most
PATIENCE = 2.0  # seconds without a bar
EVERY = 10.0  # seconds between two lines


class Reading:
    """How rows are encoded: by so many threads. `shown`: how many were is said on stderr, on a terminal as they come, else now and then."""

    def __init__(self, threads: int = 1, shown: bool = False) -> None:
        self.threads, self.shown, self.done = threads, shown, 0
        self.start = self.last = time.perf_counter()
        self.bar: Bar | None = None

    def __call__(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
        """Each item and what `work` makes of it, in their order. What `work` raises is raised when its turn comes."""
        for item, made in ((item, work(item)) for item in items) if self.threads == 1 else self._ahead(work, items):
            self._count()
            yield item, made

    def _ahead(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
        waiting: deque[tuple[T, Future[R]]] = deque()
        pool = ThreadPoolExecutor(self.threads, "rows")
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) == AHEAD:
                    first, made = waiting.popleft()
                    yield first, made.result()
            while waiting:
                first, made = waiting.popleft()
                yield first, made.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _count(self) -> None:
        """One more is done."""
        self.done += 1
        if not self.shown:
            return
        now = time.perf_counter()
        if self.bar is None and sys.stderr.isatty() and now - self.start >= PATIENCE:
            self.bar = _bar()
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], description=self._text(now))
        elif now - self.last >= EVERY:
            self.last = now
            print(self._text(now), file=sys.stderr, flush=True)

    def _text(self, now: float) -> str:
        return f"{self.done:,} rows read, {self.done / max(now - self.start, 1e-9):,.0f} a second"

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    bar.add_task("", total=None)
    bar.start()
    return bar
