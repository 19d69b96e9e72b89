"""Whether an answer is right: by its last number, by unit tests in a sandbox, or by a function of the user.

A checker never breaks a run: what goes wrong inside it is a verdict that is neither right nor wrong, with its reason in words that can
be counted. `digest` changes when verdicts may, so that a run knows which were given by an older one.

    checker = make_checker("number")
    checker.check("3 + 4 = 7", {"answer": 7})        # Verdict(right=True, said="7")
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import queue
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qwen2.post.checks import rationals
from qwen2.post.checks.sandbox import Limits, Sandbox, kill_group
from qwen2.post.checks.unit_tests import SETUPS, TESTS, setup_of, tests_of

HERE = Path(__file__).parent
KINDS = "number, tests, or a function of yours as FILE.py:NAME"
ASTRAY = "wrote into what its process answers with"
STARTING = 60.0  # seconds that a user's file may take to be imported
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """`right` is None where the checker itself failed; `said` is what it read from the answer, or what went wrong."""

    right: bool | None
    said: str


class Checker(Protocol):
    """What judges answers, from several threads at once. `name` and `digest` say which it is, `uses` which columns it looks at."""

    name: str
    digest: str
    uses: frozenset[str]

    def prepare(self, row: Row) -> None:
        """ValueError where a row lacks what answers are judged by."""

    def check(self, answer: str, row: Row) -> Verdict:
        """The verdict on an answer to a row's prompt."""

    def close(self) -> None:
        """End its processes."""


def make_checker(kind: str, seconds: float = 10.0, memory: int = 512 << 20) -> Checker:
    """A checker by what a user writes: number, tests, FILE.py:NAME. `seconds` and `memory` bound one program or call."""
    if seconds <= 0:
        raise ValueError(f"check-seconds {seconds:g}: must be above 0")
    if kind == "number":
        return NumberChecker()
    if kind == "tests":
        return TestChecker(Limits(seconds=seconds, memory=memory))
    path, colon, name = kind.rpartition(":")
    if not colon or not path.endswith(".py") or not name.isidentifier():
        raise ValueError(f"check {kind!r}: must be {KINDS}")
    return FunctionChecker(Path(path), name, seconds)


class NumberChecker:
    """Right where the answer's last number equals the row's answer, as exact rationals (rationals.py)."""

    name, digest, uses = "number", "number 1", frozenset({"answer"})

    def prepare(self, row: Row) -> None:
        """The row needs an answer that is a number, or has one."""
        if "answer" not in row:
            raise ValueError("no answer to compare with: the column answer is missing")
        rationals.exact(row["answer"])

    def check(self, answer: str, row: Row) -> Verdict:
        """Right where one reading of both is the same."""
        found = rationals.readings(answer)
        return Verdict(bool(found & rationals.exact(row["answer"])), rationals.shown(found) if found else "no number")

    def close(self) -> None:
        """Nothing to end."""


class TestChecker:
    """Right where the answer's code passes all tests of its row, run in a sandbox.

    `tests` (or `test_list`) is a list of Python sources or one of them, `setup` (or MBPP's columns) what goes before the code; or, as
    HumanEval has it, `test` defines check() and `entry_point` names what it is called with. Tests may be asserts, functions or classes
    (unit_tests.py). The code is the longest fenced block that is Python, or an answer that is nothing else.
    """

    __test__ = False  # for pytest it is a class like any other
    name, uses = "tests", frozenset({*TESTS, "entry_point", *SETUPS})

    def __init__(self, limits: Limits | None = None) -> None:
        self.sandbox = Sandbox(limits)
        self.harness = (HERE / "code_harness.py").read_text(encoding="utf-8")
        judging = self.harness + (HERE / "unit_tests.py").read_text(encoding="utf-8")
        self.digest = f"tests {hashlib.sha256(judging.encode()).hexdigest()[:16]} {self.sandbox.limits}"

    def prepare(self, row: Row) -> None:
        """The row needs tests that are Python, run, and could fail."""
        tests_of(row)

    def check(self, answer: str, row: Row) -> Verdict:
        """Right where there is code and every test passes."""
        code, tests, word = code_in(answer), tests_of(row), secrets.token_hex(16)
        if code is None:
            return Verdict(False, "no Python code")
        job = json.dumps({"solution": "\n".join([*setup_of(row), code]), "tests": tests, "word": word})
        ran = self.sandbox.run({"main.py": self.harness}, job)
        _, *report = ran.stdout.split(word)
        if len(report) != 2 or report[0] not in map(str, range(len(tests) + 1)):  # whatever it is, it is not the harness's whole report
            return Verdict(False, "ended before its tests" if ran.ok else ran.why(self.sandbox.limits))
        passed, failed = report
        return Verdict(
            passed == str(len(tests)) and not failed, f"{passed} of {len(tests)} tests passed" + (f"; {failed}" if failed else "")
        )

    def close(self) -> None:
        """Nothing to end: every program has ended."""


FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+.-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)


def code_in(answer: str) -> str | None:
    """The longest fenced block that is Python, or the whole answer where it is nothing else; None where there is no code."""
    blocks = [match[3] for match in FENCE.finditer(answer) if match[2].lower() in ("", "py", "python", "python3")]
    for block in sorted(blocks, key=len, reverse=True):
        if _is_python(block):
            return block
    return answer if not blocks and _is_python(answer) else None


def _is_python(source: str) -> bool:
    try:
        return bool(ast.parse(source).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


class FunctionChecker:
    """A function of the user, `function(answer: str, row: dict) -> bool`, in processes of its own that are killed when they hang.

    Raises FileNotFoundError or ValueError where the function cannot be had.
    """

    def __init__(self, path: Path, name: str, seconds: float = 10.0) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; --check takes {KINDS}")
        self.path, self.function, self.seconds = path.absolute(), name, seconds
        self.name, self.uses = f"{path.name}:{name}", frozenset[str]()
        self.digest = f"function {name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]} {seconds:g} s"
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._idle.put(self._start())

    def prepare(self, row: Row) -> None:
        """Rows are the function's own business."""

    def check(self, answer: str, row: Row) -> Verdict:
        """What the function says; what it does instead of saying something."""
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            try:
                process = self._start()
            except ValueError as error:  # it could be imported before
                return Verdict(None, str(error))
        line, late = process.exchange(json.dumps({"answer": answer, "row": dict(row)}), self.seconds)
        if not line:
            code = process.end()
            return Verdict(None, f"ran longer than {self.seconds:g} s" if late else f"ended its process (exit code {code})")
        told = _object(line)
        if told is None:
            process.end()
            return Verdict(None, ASTRAY)
        self._idle.put(process)
        right = told.get("right")
        return Verdict(right, "right" if right else "wrong") if isinstance(right, bool) else Verdict(None, str(told.get("error")))

    def close(self) -> None:
        """End the processes that are left."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().end()

    def _start(self) -> _Process:
        process = _Process([sys.executable, str(HERE / "check_worker.py"), str(self.path), self.function])
        line, late = process.exchange(None, STARTING)
        broken = f"its import took longer than {STARTING:g} s" if late else f"its import {ASTRAY if line else 'ended Python'}"
        told = _object(line) or {"refused": broken}
        if "refused" in told:
            process.end()
            raise ValueError(f"check {self.path}:{self.function}: {told['refused']}")
        return process


def _object(line: str) -> dict[str, Any] | None:
    """What a process answered; None where it is no JSON object: the user's function shares the process, and may write anywhere."""
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) else None


class _Process:
    """A process that answers a line with a line."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is the run's, which then ends these and what they started
        )

    def exchange(self, line: str | None, seconds: float) -> tuple[str, bool]:
        """Send a line, or only wait for one; an empty answer where there is none, and whether the time ran out."""
        process, late = self._process, threading.Event()
        assert process.stdin is not None and process.stdout is not None  # noqa: PT018

        def stop() -> None:
            late.set()
            kill_group(process)

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            if line is not None:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        finally:
            timer.cancel()
            timer.join()
        return (answer if answer.endswith("\n") and not late.is_set() else ""), late.is_set()

    def end(self) -> int:
        """End it, by killing where it does not at once, and what it started; its exit code."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None  # noqa: PT018
        with contextlib.suppress(OSError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        kill_group(process)
        code = process.wait()
        process.stdout.close()
        return code
