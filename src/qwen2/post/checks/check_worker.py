"""The process in which a function of the user judges answers. Started by path by `checkers.py`; knows nothing of the rest of qwen2.

It is the user's own program, so nothing is forbidden to it; it is a process of its own so that one that hangs, exits or breaks Python
is one counted error and not the end of a run. What it prints goes nowhere: stdout belongs to the protocol.

Protocol, JSON lines: {"ready": true} or {"refused": why} first; then {"answer", "row"} in, {"right": bool} or {"error": why} out.
"""

import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    """Load FILE, then answer with its FUNCTION until stdin ends."""
    path, name = Path(sys.argv[1]), sys.argv[2]
    sys.path[0] = str(path.parent)  # what the file imports beside itself, not what lies beside this one
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)

    def say(**line: object) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    try:
        function = load(path, name)
    except BaseException as error:
        say(refused=told(error, path))
        return
    say(ready=True)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            verdict = function(job["answer"], job["row"])
        except BaseException as error:
            say(error=f"raised {told(error, path)}")
            continue
        if type(verdict).__name__ in ("bool", "bool_"):  # numpy's too
            say(right=bool(verdict))
        else:
            say(error=f"returned {type(verdict).__name__}, not True or False")


def load(path: Path, name: str) -> Callable[[str, dict[str, Any]], object]:
    """The function of that name in a file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError("no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise AttributeError(f"no function {name}")
    return function


def told(error: BaseException, path: Path) -> str:
    """What was raised, and in which line of the file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    text = " ".join(str(error).split())[:200]
    return type(error).__name__ + (f": {text}" if text else "") + (f" (line {lines[-1]})" if lines else "")


if __name__ == "__main__":
    main()
