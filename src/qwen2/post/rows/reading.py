"""Rows made into ids, many of them by several processes, and how far that is, on stderr.

Threads would not do: half of a row's time is Python's, and the other half changes hands a dozen times. (Two cores, 700 tokens a row: 1,000
rows/s alone, as many by two threads, 1,300 by two processes; these take three seconds to start, so the first rows are encoded here.)
Rows come back in the order in which they were read, so that nothing depends on how many processes there are.

What is left out: reading files, which the caller does meanwhile, and a cache: rows are encoded again at every start.

    with Reading(workers=4, shown=True) as reading:
        for record, made in reading(partial(encoded, template, settings), read(["data.jsonl"])): ...
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

T = TypeVar("T")
R = TypeVar("R")

FIRST = 5000  # rows that are encoded here, before others are asked
CHUNK = 64  # rows that are sent together
AHEAD = 4  # of them, for each process, that were sent and not taken yet
PATIENCE = 2.0  # seconds without a bar
EVERY = 10.0  # seconds between two lines

_work: list[Callable[[Any], Any]] = []  # of a process that encodes: put there as it starts, since it is too large to be sent with rows


class Reading:
    """How rows are encoded: by so many processes. `shown`: how many were is said on stderr, on a terminal as they come, else now and then.

    More than one needs what `multiprocessing` needs of a program: a main module that can be imported without doing anything.
    """

    def __init__(self, workers: int = 1, shown: bool = False) -> None:
        self.workers, self.shown, self.done = workers, shown, 0
        self.start = self.last = time.perf_counter()
        self.bar: Bar | None = None

    def __call__(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
        """Each item and what `work` makes of it, in their order. What `work` raises is raised, and OSError where a process was ended."""
        rest = iter(items)
        for item in rest if self.workers == 1 else islice(rest, FIRST):
            self._count()
            yield item, work(item)
        following = list(islice(rest, CHUNK))
        if following:
            yield from self._by_others(work, following, rest)

    def _by_others(self, work: Callable[[T], R], chunk: list[T], rest: Iterator[T]) -> Iterator[tuple[T, R]]:
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context(method), _begin, (work,))
        sent: deque[tuple[list[T], Future[list[R]]]] = deque()
        try:
            while chunk or sent:
                if chunk:
                    sent.append((chunk, pool.submit(_many, chunk)))
                    chunk = list(islice(rest, CHUNK))
                if not chunk or len(sent) == AHEAD * self.workers:
                    first, made = sent.popleft()
                    for pair in zip(first, made.result(), strict=True):
                        self._count()
                        yield pair
        except BrokenExecutor as error:
            raise OSError("a process that encodes rows was ended, perhaps for its memory; --threads 1 needs none") from error
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


def _begin(work: Callable[[Any], Any]) -> None:
    """In a new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by the process that reads
    _work[:] = [work]


def _many(rows: list[Any]) -> list[Any]:
    return [_work[0](row) for row in rows]


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    bar.add_task("", total=None)
    bar.start()
    return bar
