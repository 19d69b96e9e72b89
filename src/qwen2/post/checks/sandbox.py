"""Programs that a model wrote, run where they can do no harm: a process of their own under limits, thrown away afterwards.

Every program gets an empty folder, an environment of six variables, and bounds on wall-clock time, processor time, memory, files and
output; it may start threads but no other process, and open no socket. On Linux that is enforced by a system call filter, and where
user namespaces are permitted by namespaces too: no network, no file outside its folder can be changed, no other process is seen, nothing
is left running. What this system cannot do is named in `Sandbox.missing`, for the caller to say once. `sandbox_worker.py` is the
process's first half.

Left out: hiding files from being read (run it as a user, or in a container, that has nothing to hide), and Windows.

    Sandbox(Limits(seconds=2)).run({"main.py": "print(6 * 7)"}).stdout        # "42\\n"
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

WORKER = Path(__file__).with_name("sandbox_worker.py")
STARTING = 20.0  # seconds that the worker may take on a busy machine before the program's own time begins
BEGUN = b"begun"
End = Literal["exit", "signal", "time", "output"]


@dataclass(frozen=True)
class Limits:
    """What one program may use. Raises ValueError for a limit that leaves nothing."""

    seconds: float = 10.0  # of the clock on the wall; of the processor's about as many
    memory: int = 512 << 20  # bytes of address space, threads' stacks included
    output: int = 1 << 16  # bytes of stdout and of stderr
    disk: int = 16 << 20  # bytes of a file, and of the whole folder where it is a file system of its own
    files: int = 64  # open at a time

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"sandbox: {name} {value}: must be above 0")


@dataclass(frozen=True)
class Ran:
    """What became of a program. `code` is its exit code, or the signal that ended it; None where it was stopped by a limit."""

    end: End
    code: int | None
    stdout: str
    stderr: str

    @property
    def ok(self) -> bool:
        """Whether it ended by itself, and well."""
        return self.end == "exit" and self.code == 0

    def why(self, limits: Limits) -> str:
        """How it ended, in a few words."""
        if self.end == "time":
            return f"ran longer than {limits.seconds:g} s"
        if self.end == "output":
            return f"wrote more than {limits.output:,} bytes"
        if self.end == "signal":
            names = {one.value: one.name for one in signal.Signals}  # the numbers of real time have none
            return f"was ended by {names.get(self.code or 0, f'signal {self.code}')}"
        last = self.stderr.strip().rpartition("\n")[2]
        return f"exit code {self.code}" + (f": {last[:200]}" if last else "")


class Sandbox:
    """Runs programs under `limits`; safe to share between threads. Raises ValueError where this system has no sandbox at all.

    `isolate` False does without namespaces, which cost a few milliseconds a program, and with them what only they can do.
    """

    def __init__(self, limits: Limits | None = None, isolate: bool = True) -> None:
        wanted = Limits() if limits is None else limits
        self.limits, self.isolate = replace(wanted, seconds=STARTING), isolate
        if sys.platform == "win32":
            raise ValueError("a sandbox for programs needs Linux or macOS; under Windows run this in WSL")
        self.missing: tuple[str, ...] = ()
        tried = self.run({"main.py": "print('ready')"})
        if tried.stdout != "ready\n":
            raise ValueError(f"the sandbox for programs does not work here: {tried.why(self.limits)}")
        self.limits = wanted

    def run(self, files: Mapping[str, str], stdin: str = "") -> Ran:
        """Run main.py among `files`, paths relative to its folder. A program that goes wrong is a `Ran` that says so, never an error."""
        with tempfile.TemporaryDirectory(prefix="qwen2-sandbox-", ignore_cleanup_errors=True) as folder:
            job: dict[str, Any] = {"files": dict(files), "stdin": stdin, "folder": folder, "python": sys.executable}
            job |= {"limits": asdict(self.limits), "isolate": self.isolate}
            read, write = os.pipe()
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(WORKER), str(write)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env={"PATH": os.defpath},
                    cwd=folder,
                    pass_fds=[write],
                    start_new_session=True,
                )
            except BaseException:
                os.close(read)
                raise
            finally:
                os.close(write)
            try:
                return self._followed(process, json.dumps(job).encode(), read)
            finally:
                os.close(read)
                _end(process)

    def _followed(self, process: subprocess.Popen[bytes], job: bytes, status: int) -> Ran:
        """Give the worker its job, gather what comes, stop at a limit."""
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None  # noqa: PT018
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(job)
        texts = {status: bytearray(), process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
        deadline, begun, end = time.monotonic() + STARTING, False, None
        with selectors.DefaultSelector() as selector:
            for file in texts:
                selector.register(file, selectors.EVENT_READ)
            while selector.get_map() and end is None:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready and time.monotonic() >= deadline:
                    end = "time"
                for key, _ in ready:
                    piece = os.read(key.fd, 1 << 16)
                    texts[key.fd] += piece
                    if not piece:
                        selector.unregister(key.fd)
                    elif key.fd == status and not begun and BEGUN in texts[status]:
                        begun, deadline = True, time.monotonic() + self.limits.seconds
                    elif key.fd != status and len(texts[key.fd]) > self.limits.output:
                        end = "output"
                if status not in selector.get_map() and end is None:  # the program is over: what it wrote is in the pipes
                    deadline = min(deadline, time.monotonic() + 0.5)
        stdout, stderr = (texts[file.fileno()] for file in (process.stdout, process.stderr))
        return self._ran(bytes(texts[status]), bytes(stdout), bytes(stderr), end)

    def _ran(self, status: bytes, stdout: bytes, stderr: bytes, end: str | None) -> Ran:
        written, errors = (text[: self.limits.output].decode("utf-8", "replace") for text in (stdout, stderr))
        lines = status.splitlines()
        if lines and lines[0].startswith(BEGUN):
            self.missing = tuple(json.loads(lines[0][len(BEGUN) :]))
        if end == "output" or len(lines) < 2:  # the second line says how the program ended
            stopped: End = "output" if end == "output" else "time" if end == "time" else "exit"
            return Ran(stopped, None, written, errors)
        code = int(lines[1])
        if -code == signal.SIGXCPU or -code == signal.SIGKILL:  # its share of the processor's time, which the kernel watches
            return Ran("time", None, written, errors)
        return Ran("exit" if code >= 0 else "signal", abs(code), written, errors)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the worker, its group and with them the program; nobody is left to wait for."""
    kill_group(process)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process that has a session of its own, and what it started; where there are no groups of processes, only itself.

    What has ended already is no error: what it left behind is killed.
    """
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter is macOS's word for a group that has ended
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
