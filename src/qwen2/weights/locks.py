"""Locks between processes: one pull of a model at a time, and no removal of a model that a running process uses.

A user of a model keeps a lock file of its own, named by its process number, locked for as long as it lives. The operating system
lets go of it however the process ends, so a crash leaves nothing that a later `rm` could mistake for use; an orderly end leaves
nothing at all.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)  # a store shared for reading
LOOK_SECONDS = 0.25  # between two looks at whether a wait goes on
TRIES = 100  # before it is believed that a folder cannot be made


def make(folder: Path) -> None:
    """Make a folder and those above it, also where another process is removing one of them as empty (`folders.prune`)."""
    for left in reversed(range(TRIES)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return
        except (FileNotFoundError, FileExistsError):  # the one above it went in between, or it did itself
            if not left:
                raise


@contextlib.contextmanager
def alone(folder: Path, doing: str) -> Iterator[None]:
    """Hold a folder that is written into, made where it is not there. ValueError where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder}: another {doing} works in this folder; wait for it, or name another folder") from None
    try:
        yield
    finally:
        lock.release()


def acquire(lock: FileLock, on_wait: Callable[[], None] | None = None) -> None:
    """Wait for a lock. `on_wait` is called when the wait begins and from then on every moment; what it raises ends the wait."""
    while True:
        if on_wait is not None:
            on_wait()
        try:
            lock.acquire(timeout=LOOK_SECONDS)
            return
        except Timeout:
            continue


class Hold:
    """Says that this process uses a model, until `release`, or until nothing refers to it, or the end of the process."""

    def __init__(self, folder: Path) -> None:
        """A store that this user cannot write to is used without a hold: this user could not remove from it either."""
        self._end: Callable[[], object] | None = None
        path = folder / f"{os.getpid()}-{secrets.token_hex(4)}.lock"
        try:
            make(folder)
            lock = FileLock(path, thread_local=False)  # a model may be closed in another thread
            lock.acquire(timeout=0)
            path.with_suffix(".txt").write_text(_command(), encoding="utf-8")
        except OSError as error:
            if error.errno not in NOT_WRITABLE:
                raise
            return
        self._end = weakref.finalize(self, _let_go, lock, path, os.getpid())  # runs once, at the latest when Python ends

    def release(self) -> None:
        """Stop using the model."""
        if self._end is not None:
            self._end()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def holders(folder: Path) -> list[str]:
    """Who uses the model now, as `process 1234 (qwen2 run ...)`; what crashed processes left is cleared away."""
    found = []
    for path in sorted(folder.glob("*.lock")):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            text = path.with_suffix(".txt")
            command = f" ({text.read_text(encoding='utf-8')})" if text.exists() else ""
            found.append(f"process {path.stem.partition('-')[0]}{command}")
        else:
            lock.release()
            _forget(path)
    return found


def _let_go(lock: FileLock, path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child's end is not the end of the use
        lock.release()
        _forget(path)


def _forget(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".txt").unlink(missing_ok=True)


def _command() -> str:
    """What this process is doing, in at most 60 characters."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])[:60] if sys.argv else ""
