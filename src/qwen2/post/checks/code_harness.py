"""What runs inside the sandbox: a solution, then its tests one by one, then a report that only it can have written.

Sent there as main.py by `checkers.py`; knows nothing of the rest of qwen2. The job is JSON on stdin, so that no file names the tests;
what the solution prints goes nowhere. The report goes to what stdout was: a word that the solution does not know, how many tests
passed, the word again, and what failed first. What runs, counts and writes is bound before the solution is there, which may replace
every name in every module; tests find builtins as they were then, and a unittest that the solution never saw. Other modules that they
assert with are as the solution left them, a program that goes looking for the word in the memory of its own process finds it, and one
whose results say that they equal everything passes tests that ask no more: verdicts are for models that try to solve the problem, and
samples of what was kept are worth reading.
"""

import builtins
import json
import linecache
import os
import sys
from collections.abc import Callable


def main() -> None:
    """Run, count, report."""
    job = json.loads(sys.stdin.read())
    word, solution, tests = job["word"], job["solution"], list(enumerate(job["tests"], start=1))
    out, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):  # stdin is a file, which could be read again
        os.dup2(nowhere, number)
    run, tell, write, leave = executing(), told, os.write, os._exit
    put_back = putting_back(any("unittest" in test for _, test in tests))
    passed, failed = 0, ""
    scope = {"__name__": "solution"}
    try:
        run("solution", solution, scope)
    except BaseException as error:
        failed = "the solution raised " + tell(error)
    else:
        put_back(scope)
        for number, test in tests:
            try:
                run(f"test {number}", test, scope)
                passed += 1
            except BaseException as error:
                failed = failed or f"test {number}: {tell(error)}"
    write(out, f"{word}{passed}{word}{failed[:300]}".encode("utf-8", "replace"))
    leave(0)


def executing() -> Callable[[str, str, dict], None]:
    """What runs a source in a scope, so that its lines can be shown."""
    compiled, run, cache = compile, exec, linecache.cache

    def execute(name: str, source: str, scope: dict) -> None:
        cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        run(compiled(source, name, "exec"), scope)

    return execute


def putting_back(has_unittest: bool) -> Callable[[dict], None]:
    """What gives tests the builtins of now, and a unittest that is out of the solution's sight, which imports another."""
    names, now, modules, unseen = vars(builtins), dict(vars(builtins)), sys.modules, {}

    def of_unittest() -> list[str]:
        return [name for name in modules if name.partition(".")[0] == "unittest"]

    if has_unittest:  # whose import takes longer than most tests
        import unittest  # noqa: F401

        unseen.update({name: modules.pop(name) for name in of_unittest()})

    def put_back(scope: dict) -> None:
        names.update(now)
        scope["__builtins__"] = names
        if unseen:
            for name in of_unittest():
                del modules[name]
            modules.update(unseen)

    return put_back


def told(error: BaseException) -> str:
    """An error in a line: what was raised, or the assertion that does not hold."""
    text = " ".join(str(error).split())
    trace, where = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename != main.__code__.co_filename:
            where = trace
        trace = trace.tb_next
    if isinstance(error, AssertionError) and not text and where is not None:
        text = linecache.getline(where.tb_frame.f_code.co_filename, where.tb_lineno).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


if __name__ == "__main__":
    main()
