"""The thread that turns an engine: it runs while there is work, sleeps while there is none, and does not keep the engine alive.

Everything that changes the scheduler or the cache happens on it. Others leave requests in an inbox and mark what shall end.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_alive: weakref.WeakSet[Worker] = weakref.WeakSet()  # to be ended before the interpreter is


class Turned(Protocol):
    """What a worker turns."""

    def turn(self) -> bool:
        """A step; whether there is more to do."""


class Worker:
    """Calls `turn` of whatever it is given, on one thread of its own; `one_thread` holds torch's products to that one thread.

    Beside the kernels' threads torch's own would spin against them. What other threads have stays as it was.
    """

    def __init__(self, turned: Turned, one_thread: bool) -> None:
        self._turned: Callable[[], Any] = weakref.ref(turned, lambda _: self.stop())
        self._one_thread = one_thread
        self._wanted, self._stopped = threading.Event(), False
        self._begun = threading.Event()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def wake(self) -> None:
        """There is work."""
        if self._thread is None:
            self._start()
        self._wanted.set()

    def is_current(self) -> bool:
        """Whether this is called on the worker's own thread."""
        return self._thread is threading.current_thread()

    def _start(self) -> None:
        with self._starting:
            if self._thread is None and not self._stopped:
                self._thread = threading.Thread(target=self._run, name="qwen2-engine", daemon=True)
                _alive.add(self)
                before = torch.get_num_threads()
                self._thread.start()
                self._begun.wait()
                if self._one_thread:
                    torch.set_num_threads(before)  # the last call, from whatever thread, is what later threads begin with

    def stop(self) -> None:
        """End after the step that is running; nothing more is done then."""
        self._stopped = True
        self._wanted.set()

    def join(self) -> None:
        """Wait for the end."""
        if self._thread is not None and not self.is_current():
            self._thread.join()

    def _run(self) -> None:
        if self._one_thread:
            torch.set_num_threads(1)
        self._begun.set()
        with torch.inference_mode():
            while not self._stopped:
                self._wanted.clear()
                turned = self._turned()
                more = turned is not None and turned.turn()
                del turned  # or it could not go while this thread sleeps
                if not more:
                    self._wanted.wait()


@atexit.register
def _end() -> None:
    """No step may run while the interpreter takes itself apart."""
    workers = list(_alive)
    for worker in workers:
        worker.stop()
    for worker in workers:
        worker.join()
