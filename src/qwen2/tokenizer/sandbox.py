"""A checkpoint's Jinja template, rendered in a process that can be stopped.

The process is started at the first rendering, kept for the next ones (a rendering then costs about a millisecond), and killed when
it oversteps a limit, when its owner is collected, or at exit. A timer kills it, so this works from any thread on any system.
Why a process at all: see `sandbox_worker.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("sandbox_worker.py")
START_SECONDS = 60.0  # for a Python process and Jinja to start on a busy machine


@dataclass(frozen=True)
class Limits:
    """What one rendering may use."""

    seconds: float = 5.0
    memory: int = 1 << 30  # bytes of address space
    output: int = 1 << 24  # characters


class JinjaSandbox:
    """Renders templates under limits; safe to share between threads, which take turns."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = Limits() if limits is None else limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = os.getpid()
        self._finalizer: weakref.finalize[..., Any] | None = None

    def render(self, source: str, context: dict[str, Any]) -> str:
        """The text, or a ValueError that says why there is none."""
        job = json.dumps({"source": source, "context": context})
        with self._lock:
            process = self._running()
            line, timed_out = _exchange(process, job, self.limits.seconds)
            if timed_out or not line:
                self._stop()
        if timed_out and not line:
            raise ValueError(f"the model's chat template ran longer than {self.limits.seconds:g} s and was stopped")
        if not line:
            raise ValueError(f"the model's chat template broke its process, which may use {self.limits.memory >> 20} MiB")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(f"the model's chat template failed: {answer['error']}")
        return str(answer["text"])

    def close(self) -> None:
        """End the process; the next rendering starts another."""
        with self._lock:
            self._stop()

    def __reduce__(self) -> tuple[type[JinjaSandbox], tuple[Limits]]:
        return JinjaSandbox, (self.limits,)  # a copy in another process starts its own

    def _running(self) -> subprocess.Popen[str]:
        if self._finalizer is not None and self._owner != os.getpid():
            self._finalizer.detach()  # after a fork: the process is our parent's to talk to and to end
            self._process = self._finalizer = None
        if self._process is None or self._process.poll() is not None:
            self._stop()
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="ascii",
            )
            self._finalizer = weakref.finalize(self, _end, self._process)
            self._owner = os.getpid()
            ready, _ = _exchange(self._process, json.dumps(asdict(self.limits)), START_SECONDS)
            if not ready:
                self._stop()
                raise OSError(f"the process for chat templates does not start: {sys.executable} {WORKER}")
        return self._process

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None


def _exchange(process: subprocess.Popen[str], line: str, seconds: float) -> tuple[str, bool]:
    """Write a line, read a line; an empty answer if there was none, and whether the time ran out."""
    assert process.stdin is not None
    assert process.stdout is not None
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except (BrokenPipeError, OSError):
        answer = ""
    finally:
        timer.cancel()
        timer.join()  # so that it does not kill the process after we have seen an answer and gone on
    whole = answer.endswith("\n")
    return (answer if whole else ""), expired.is_set()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:  # what was still to be written has no reader any more
                continue
