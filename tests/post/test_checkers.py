"""Verdicts: right, wrong, or a checker that failed, which is named and never ends a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwen2.post.checks.checkers import FunctionChecker, TestChecker, Verdict, code_in, make_checker
from qwen2.post.checks.sandbox import Limits

UNIX = pytest.mark.skipif(sys.platform == "win32", reason="a sandbox needs Linux or macOS, and says so")


def test_numbers() -> None:
    checker = make_checker("number")
    assert checker.check("3 + 4 = 7", {"answer": 7}) == Verdict(True, "7")
    assert checker.check("about 3.5 kg", {"answer": "7/2"}) == Verdict(True, "7/2")
    assert checker.check("8", {"answer": 7}) == Verdict(False, "8")
    assert checker.check("seven", {"answer": 7}) == Verdict(False, "no number")
    for row, why in (({}, "the column answer is missing"), ({"answer": "none"}, "has no number"), ({"answer": None}, "is no number")):
        with pytest.raises(ValueError, match=why):
            checker.prepare(row)


@pytest.mark.parametrize("kind", ["", "numbers", "check.py", "check.py:", "check.py:a b", "check.txt:f", ":f"])
def test_unknown_kinds(kind: str) -> None:
    with pytest.raises(ValueError, match=r"must be number, tests, or a function of yours as FILE.py:NAME"):
        make_checker(kind)


# --- code


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nand\n```py\nx = 1\ny = 2\n```", "x = 1\ny = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1", "x = 1"),
        ("~~~python\nx = 1\n~~~", "x = 1\n"),
        ("```bash\nls\n```", None),
        ("```python\nx = = 1 and more\n```\n```python\nx = 2\n```", "x = 2\n"),
        ("I do not know.", None),
        ("# only a comment", None),
        ("", None),
    ],
)
def test_the_code_of_an_answer(answer: str, code: str | None) -> None:
    assert code_in(answer) == code


@pytest.fixture(scope="module")
def coder() -> TestChecker:
    return TestChecker(Limits(seconds=30.0))


@UNIX
@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        ("def f(x): return x + 1", Verdict(True, "3 of 3 tests passed")),
        ("def f(x): return x", Verdict(False, "1 of 3 tests passed; test 1: AssertionError: assert f(1) == 2")),
        ("def g(x): return x", Verdict(False, "0 of 3 tests passed; test 1: NameError: name 'f' is not defined")),
        ("1 / 0", Verdict(False, "0 of 3 tests passed; the solution raised ZeroDivisionError: division by zero")),
        ("import os\nos._exit(0)", Verdict(False, "ended before its tests")),
        ("import sys\nsys.exit(0)", Verdict(False, "0 of 3 tests passed; the solution raised SystemExit: 0")),
        ("print('9' * 10**6)\ndef f(x): return x + 1", Verdict(True, "3 of 3 tests passed")),
        ("no code at all", Verdict(False, "no Python code")),
        ("def f(x): return f(x)", Verdict(False, "0 of 3 tests passed; test 1: RecursionError: maximum recursion depth exceeded")),
    ],
)
def test_unit_tests(coder: TestChecker, code: str, verdict: Verdict) -> None:
    assert coder.check(code, {"tests": ["assert f(1) == 2", "assert f(2) == 3", "f(9)"]}) == verdict


@UNIX
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import json\njson.dumps = lambda *a, **k: 'x'", "0 of 1 tests passed"),
        ('import json\njson.dumps = lambda *a, **k: \'{"passed": 1, "failed": ""}\'', "0 of 1 tests passed"),
        ("import os\nwrite = os.write\nos.write = lambda file, data: write(file, data.replace(b'0', b'1', 1)[:33])", "0 of 1 tests passed"),
        ("import builtins\nbuiltins.exec = builtins.compile = lambda *a: ''", "0 of 1 tests passed"),
        ("import builtins\nbuiltins.enumerate = lambda *a, **k: [(1, '')]", "0 of 1 tests passed"),
        ("import __main__\n__main__.executing = lambda: None\n__main__.told = lambda *a: ''", "0 of 1 tests passed"),
        ("import builtins\nbuiltins.BaseException = MemoryError", "0 of 1 tests passed; test 1: AssertionError"),
        ("import builtins\nbuiltins.abs = lambda x: 2", "0 of 1 tests passed; test 1: AssertionError"),
        ("__builtins__ = {'globals': lambda: {'f': lambda x: 2}}", "0 of 1 tests passed; test 1: AssertionError"),
        (
            "import os\nfor file in range(3, 9):\n    try: os.write(file, b'x' * 65480)\n    except OSError: pass",
            "wrote more than 65,536 bytes",
        ),
        ("import os\nfor file in range(3, 9):\n    try: os.write(file, b'x' * 99)\n    except OSError: pass", "0 of 1 tests passed"),
        ("import os\nos.closerange(3, 9)", "exit code 1: OSError: [Errno 9] Bad file descriptor"),
        ("import sys\nsys.stdout = None\ndef f(x): raise ValueError('\\udc80')", "0 of 1 tests passed; test 1: ValueError: ?"),
        (  # who reads the job again
            "import json, os, sys\nsys.stdin.seek(0)\njob = json.load(sys.stdin)\nword = job['word']\n"
            "os.write(3, (word + str(len(job['tests'])) + word).encode())\nos._exit(0)",
            "0 of 1 tests passed; the solution raised",
        ),
        (  # who does look for the word, and writes what is no report: a verdict still
            "import os, sys\nword = sys._getframe(2).f_locals['word'].encode()\n"
            "for file in range(3, 9):\n    try: os.write(file, word + b'9' * 5000 + word)\n    except OSError: pass\nos._exit(0)",
            "ended before its tests",
        ),
    ],
)
def test_a_solution_that_meddles_with_its_report(coder: TestChecker, code: str, said: str) -> None:
    verdict = coder.check(code, {"tests": ["assert globals().get('f', abs)(1) == 2"]})
    assert (verdict.right, verdict.said.startswith(said)) == (False, True), verdict


@UNIX
def test_a_program_that_hangs() -> None:
    assert TestChecker(Limits(seconds=0.3)).check("while True: pass", {"tests": "f()"}) == Verdict(False, "ran longer than 0.3 s")


@UNIX
def test_human_eval(coder: TestChecker) -> None:
    row = {"test": "def check(candidate):\n    assert candidate(2) == 4", "entry_point": "double"}
    coder.prepare(row)
    assert coder.check("```python\ndef double(x):\n    return 2 * x\n```", row).right
    assert coder.check("```python\ndef double(x):\n    return x\n```", row).said.endswith("AssertionError: assert candidate(2) == 4")
    assert coder.check("def double(x): return two * x", {**row, "setup": "two = 2"}).right


@UNIX
def test_mbpp(coder: TestChecker) -> None:
    row = {"test_imports": ["import math", "import re"], "test_setup_code": "", "test_list": ["assert f(4) == 2", "assert f(9) == 3"]}
    assert coder.check("def f(x): return math.isqrt(x)", row) == Verdict(True, "2 of 2 tests passed")


# --- functions of the user

MINE = """
import os, time
CALLS = 0
def good(answer, row):
    return answer == row["wanted"]
def odd(answer, row):
    if answer == "raise":
        raise KeyError("missing")
    if answer == "hang":
        time.sleep(60)
    if answer == "exit":
        os._exit(3)
    if answer == "none":
        return None
    if answer == "astray":
        for file in range(3, 20):
            try: os.write(file, b"\\xff[]\\n")
            except OSError: pass
    print("this must not be taken for a verdict")
    return answer == "yes"
"""


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[Callable[..., FunctionChecker]]:
    (tmp_path / "mine.py").write_text(MINE)
    made = []

    def make(name: str, seconds: float = 20.0) -> FunctionChecker:
        made.append(FunctionChecker(tmp_path / "mine.py", name, seconds))
        return made[-1]

    yield make
    for checker in made:
        checker.close()


def test_a_function(mine: Callable[..., FunctionChecker]) -> None:
    checker = mine("good")
    assert checker.check("\u4e2d", {"wanted": "\u4e2d"}) == Verdict(True, "right")
    assert checker.check("a", {"wanted": "b"}) == Verdict(False, "wrong")
    assert checker.check("a", {}) == Verdict(None, "raised KeyError: 'wanted' (line 5)")
    assert checker.check("a", {"wanted": "a"}).right


def test_a_function_that_fails_is_named_and_the_next_answer_is_judged(mine: Callable[..., FunctionChecker]) -> None:
    checker = mine("odd", 1.0)
    assert checker.check("raise", {}) == Verdict(None, "raised KeyError: 'missing' (line 8)")
    assert checker.check("hang", {}) == Verdict(None, "ran longer than 1 s")
    assert checker.check("exit", {}) == Verdict(None, "ended its process (exit code 3)")
    assert checker.check("none", {}) == Verdict(None, "returned NoneType, not True or False")
    assert checker.check("astray", {}) == Verdict(None, "wrote into what its process answers with")
    assert checker.check("yes", {}) == Verdict(True, "right")
    checker.path.unlink()  # nor does a process end the run that can no longer be started
    assert checker.check("exit", {}).right is None
    assert "FileNotFoundError" in checker.check("yes", {}).said


STARTS = """
import os, subprocess, sys
CHILD = "import time; file = open({pipe!r}, 'w'); print(flush=True); time.sleep(20); file.write('left behind')"
def f(answer, row):
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
    child.stdout.readline()
    if answer == "exit":
        os._exit(3)
    return answer == "leave" or child.wait() == 0
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="a function's processes are its own where these have no groups")
@pytest.mark.parametrize("answer", ["hang", "exit", "leave"])
def test_what_a_function_started_ends_with_its_process(answer: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "starts.py").write_text(STARTS.format(pipe=str(tmp_path / "pipe")))
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    checker = FunctionChecker(tmp_path / "starts.py", "f", 3.0)
    verdict = checker.check(answer, {})
    checker.close()
    os.set_blocking(pipe, True)
    with open(pipe, "rb") as file:
        assert file.read() == b""  # at its end as soon as nobody has it open
    assert verdict.right is (True if answer == "leave" else None)


def test_functions_that_cannot_be_had(tmp_path: Path, mine: Callable[..., FunctionChecker]) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone.py: no such file; --check takes number"):
        FunctionChecker(tmp_path / "gone.py", "f")
    with pytest.raises(ValueError, match=r"mine.py:absent: AttributeError: no function absent"):
        mine("absent")
    with pytest.raises(ValueError, match=r"mine.py:CALLS: AttributeError: no function CALLS"):
        mine("CALLS")
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(ValueError, match=r"broken.py:f: SyntaxError"):
        FunctionChecker(tmp_path / "broken.py", "f")
    (tmp_path / "ends.py").write_text("import os\nos._exit(1)\n")
    with pytest.raises(ValueError, match=r"ends.py:f: its import ended Python"):
        FunctionChecker(tmp_path / "ends.py", "f")


def test_the_digest_follows_the_file(tmp_path: Path, mine: Callable[..., FunctionChecker]) -> None:
    before, same = mine("good").digest, mine("good").digest
    (tmp_path / "mine.py").write_text(MINE + "\n# mended\n")
    assert before == same != mine("good").digest
