"""What runs inside the sandbox: a solution, then its tests one by one, then a report that only it can have written.

Sent there as main.py by `checkers.py`; knows nothing of the rest of qwen2. The job is JSON on stdin, so that no file names the tests;
the report goes to what stdout was, after a word that the solution does not know, and what the solution prints goes nowhere. A
program that goes looking for this word in the memory of its own process finds it: verdicts are for models that try to solve the
problem, and samples of what was kept are worth reading.
"""

import json
import linecache
import os
import sys


def main() -> None:
    """Run, count, report."""
    job = json.loads(sys.stdin.read())
    out, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    passed, failed = 0, ""
    scope = {"__name__": "solution"}
    try:
        execute("solution", job["solution"], scope)
    except BaseException as error:
        failed = "the solution raised " + told(error)
    else:
        for number, test in enumerate(job["tests"], start=1):
            try:
                execute(f"test {number}", test, scope)
                passed += 1
            except BaseException as error:
                failed = failed or f"test {number}: {told(error)}"
    os.write(out, (job["word"] + json.dumps({"passed": passed, "failed": failed[:300]})).encode())
    os._exit(0)


def execute(name: str, source: str, scope: dict) -> None:
    """Run a source in a scope; its lines can be shown."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), scope)


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
