"""A worker seen from outside: started, asked line by line, closed; and where llama.cpp is.

Left out: what it measures (engines.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Worker:
    """An engine's process. SystemExit with its one line when it cannot start or fails."""

    def __init__(self, column: str, engine: str, python: str, options: dict[str, Any], environment: dict[str, str]) -> None:
        self.column = column
        command = [python, str(HERE / "worker.py"), engine, json.dumps(options)]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the worker
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env={**os.environ, **environment}
            )
        except OSError as error:
            raise SystemExit(f"{column}: cannot run {python}: {error.strerror}") from None
        self._answer()

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {}
        if not line or "error" in answer:
            self.log.seek(0)
            said = self.log.read().strip().splitlines() or ["it said nothing"]
            raise SystemExit(answer.get("error", f"{self.column}: the worker ended: {said[-1]}"))
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def interpreter(given: str) -> tuple[str, Path | None]:
    """The Python that has llama_cpp and, where a build folder was given, the folder of its libraries."""
    path = Path(given)
    if not path.is_dir():
        return given, None
    folder = next(
        (p.parent.resolve() for p in (path / "bin" / "libllama.so", path / "libllama.so", path / "bin" / "libllama.dylib") if p.exists()),
        None,
    )
    if folder is None:
        raise SystemExit(
            f"--llama-cpp {given}: no libllama in it; give a Python that has llama_cpp, or a build folder with bin/libllama.so"
        )
    return sys.executable, folder
